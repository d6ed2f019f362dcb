// AVX2: vpmaddubsw into 16-bit accumulators over proven segments (up to 15 bits), vpmaddwd on 16-bit codes for 8 x 8.
#include "linear_avx2.h"
#include "mac_avx2.h"
#include "rows.h"

namespace fxquant {
namespace {

using avx2::mac32;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

inline __m256i broadcast8(const uint8_t* p) {
  int64_t eight;
  std::memcpy(&eight, p, 8);
  return _mm256_set1_epi64x(eight);
}

// a += maddubs(x, w0), b += maddubs(x, w1) in 16 bits. The asm keeps gcc from hoisting loads and spilling accumulators; x
// is the second temporary, so that both products are on their way before the first addition waits.
inline void mac16(__m256i& a, __m256i& b, __m256i x, __m256i w0, __m256i w1) {
#if defined(__GNUC__) && !defined(FXQUANT_SIMDE)
  __m256i t;
  asm volatile("vpmaddubsw %[w0], %[x], %[t]\n\tvpmaddubsw %[w1], %[x], %[x]\n\tvpaddw %[t], %[a], %[a]\n\tvpaddw %[x], %[b], %[b]"
               : [a] "+x"(a), [b] "+x"(b), [x] "+x"(x), [t] "=&x"(t)
               : [w0] "x"(w0), [w1] "x"(w1));
#else
  a = _mm256_add_epi16(a, _mm256_maddubs_epi16(x, w0));
  b = _mm256_add_epi16(b, _mm256_maddubs_epi16(x, w1));
#endif
}

// R rows x 16 columns over the segments of a panel: 16-bit lanes start at the centre, and widen once a segment.
#define DECLARE(r) __m256i a##r, b##r;
#define CENTRE(r) a##r = w0, b##r = w1;
#define MAC(r)                                                                          \
  {                                                                                     \
    const __m256i x = broadcast4((r < 3 ? low : high) + (r < 3 ? r : r - 3) * stride);  \
    mac16(a##r, b##r, x, w0, w1);                                                       \
  }
#define WIDEN(r)                                                                                          \
  to[2 * r] = _mm256_add_epi32(first ? start0 : to[2 * r], _mm256_madd_epi16(a##r, ones));                \
  to[2 * r + 1] = _mm256_add_epi32(first ? start1 : to[2 * r + 1], _mm256_madd_epi16(b##r, ones));
#define SEGMENTED(R)                                                                                            \
  void segmented_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, const uint16_t* lengths,           \
                     const int16_t* centres, int64_t count, const int32_t* starts, int32_t* sums) {             \
    const uint8_t *low = codes, *high = codes + 3 * stride;                                                     \
    __m256i* to = reinterpret_cast<__m256i*>(sums);                                                             \
    __m256i w0, w1;                                                                                             \
    FXQUANT_ROWS_##R(DECLARE) for (int64_t g = 0; g < count; g++) {                                             \
      w0 = load(centres + g * 32), w1 = load(centres + g * 32 + 16);                                            \
      FXQUANT_ROWS_##R(CENTRE) for (int64_t s = lengths[g]; s > 0; s--) {                                       \
        w0 = load(w), w1 = load(w + 32);                                                                        \
        FXQUANT_ROWS_##R(MAC) w += 64, low += 4, high += 4;                                                     \
      }                                                                                                         \
      const __m256i ones = _mm256_set1_epi16(1), start0 = load(starts), start1 = load(starts + 8);              \
      const bool first = g == 0;                                                                                \
      FXQUANT_ROWS_##R(WIDEN)                                                                                   \
    }                                                                                                           \
  }
SEGMENTED(1) SEGMENTED(2) SEGMENTED(3) SEGMENTED(4) SEGMENTED(5) SEGMENTED(6)

using SegmentedFn = void (*)(const uint8_t*, int64_t, const uint8_t*, const uint16_t*, const int16_t*, int64_t,
                             const int32_t*, int32_t*);
constexpr SegmentedFn kSegmented[] = {segmented_1, segmented_2, segmented_3, segmented_4, segmented_5, segmented_6};

void panel_15(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
              int32_t* sums) {
  kSegmented[rows - 1](codes, stride, packed + layout.weights + p * layout.steps * 64,
                       reinterpret_cast<const uint16_t*>(packed + layout.lengths) + p * layout.capacity,
                       reinterpret_cast<const int16_t*>(packed + layout.centres) + p * layout.capacity * 32,
                       reinterpret_cast<const int32_t*>(packed + layout.counts)[p],
                       reinterpret_cast<const int32_t*>(packed + layout.starts) + p * 16, sums);
}

// R rows x 8 columns, 16-bit codes against sign-extended weights: vpmaddwd is exact. Each accumulator holds four
// columns as two halves, added at the end.
inline __m256i widen(const uint8_t* w) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))); }

inline __m256i join(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8); }

#define ZERO(r) __m256i a##r = zero, b##r = zero;
#define MAC_WIDE(r)                                                                     \
  {                                                                                     \
    const __m256i x = broadcast8((r < 3 ? low : high) + (r < 3 ? r : r - 3) * stride);  \
    mac32(a##r, x, w0);                                                                 \
    mac32(b##r, x, w1);                                                                 \
  }
#define JOIN(r) to[2 * r] = join(a##r, b##r);
#define WIDE(R)                                                                                           \
  void wide_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t steps, int32_t* sums) {   \
    const uint8_t *low = codes, *high = codes + 3 * stride;                                               \
    const __m256i zero = _mm256_setzero_si256();                                                          \
    __m256i* to = reinterpret_cast<__m256i*>(sums);                                                       \
    FXQUANT_ROWS_##R(ZERO) for (int64_t s = 0; s < steps; s++, w += 64, low += 8, high += 8) {            \
      const __m256i w0 = widen(w), w1 = widen(w + 16);                                                    \
      FXQUANT_ROWS_##R(MAC_WIDE)                                                                          \
    }                                                                                                     \
    FXQUANT_ROWS_##R(JOIN)                                                                                \
  }
WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6)

// One row x 16 columns: nothing is reused, so the weights pass by once.
void wide_row(const uint8_t* codes, const uint8_t* w, int64_t steps, int32_t* sums) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (int64_t s = 0; s < steps; s++, w += 64, codes += 8) {
    const __m256i x = broadcast8(codes);
    mac32(a, x, widen(w));
    mac32(b, x, widen(w + 16));
    mac32(c, x, widen(w + 32));
    mac32(d, x, widen(w + 48));
  }
  __m256i* to = reinterpret_cast<__m256i*>(sums);
  to[0] = join(a, b), to[1] = join(c, d);
}

constexpr void (*kWide[])(const uint8_t*, int64_t, const uint8_t*, int64_t, int32_t*) = {
    wide_2, wide_3, wide_4, wide_5, wide_6};

void panel_8x8(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
               int32_t* sums) {
  const uint8_t* weights = packed + layout.weights + p * layout.steps * 64;
  if (rows == 1) return wide_row(codes, weights, layout.steps, sums);
  kWide[rows - 2](codes, stride, weights, layout.steps, sums);           // columns 0 to 7
  kWide[rows - 2](codes, stride, weights + 32, layout.steps, sums + 8);  // columns 8 to 15
}

}  // namespace

const Kernels kAvx2 = {avx2::extent, avx2::encode, avx2::encode_channels, panel_8x8, panel_15, nullptr, avx2::finish, 6, 6, true};

}  // namespace fxquant
