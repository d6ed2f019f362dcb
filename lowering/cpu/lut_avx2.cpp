// AVX2 look-ups: vpshufb reads 32 tables entries at once (16 columns, both planes of each), vpmaddubsw takes minus from plus.
#include "lut_layout.h"
#include "rows.h"
#include "simd.h"

#include <cstring>

namespace fxquant {
namespace {

inline __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i table(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// A shuffle that puts code `at` where the entry's index has the bit, and zero elsewhere; the upper lane takes at + 4.
inline __m256i spread(int32_t bit, int32_t at) {
  alignas(32) uint8_t from[32];
  for (int32_t i = 0; i < 16; i++) {
    from[i] = static_cast<uint8_t>(i >> bit & 1 ? at : 0x80);
    from[16 + i] = static_cast<uint8_t>(i >> bit & 1 ? at + 4 : 0x80);
  }
  return load(from);
}

inline __m256i subset_sums(__m256i codes, __m256i s0, __m256i s1, __m256i s2, __m256i s3) {
  return _mm256_add_epi8(_mm256_add_epi8(_mm256_shuffle_epi8(codes, s0), _mm256_shuffle_epi8(codes, s1)),
                         _mm256_add_epi8(_mm256_shuffle_epi8(codes, s2), _mm256_shuffle_epi8(codes, s3)));
}

void build(const uint8_t* codes, int64_t steps, uint8_t* tables) {
  const __m256i a0 = spread(0, 0), a1 = spread(1, 1), a2 = spread(2, 2), a3 = spread(3, 3);
  const __m256i b0 = spread(0, 8), b1 = spread(1, 9), b2 = spread(2, 10), b3 = spread(3, 11);
  for (int64_t s = 0; s < steps; s++, codes += kLutStep, tables += kLutRows * 64) {
    const __m256i x = table(codes);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables), subset_sums(x, a0, a1, a2, a3));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tables + 32), subset_sums(x, b0, b1, b2, b3));
  }
}

// Looks four indices up in the tables of one row and adds plus - minus to its 16-bit accumulator. The first form is one
// piece of assembly for the most common depth: gcc hoists the loads of all rows and spills accumulators otherwise.
#if defined(__GNUC__) && !defined(FXQUANT_SIMDE)
inline void add_4(__m256i& acc, const uint8_t* t, __m256i i0, __m256i i1, __m256i i2, __m256i i3, __m256i signs) {
  __m256i sum, entry;
  const __m128i* tables = reinterpret_cast<const __m128i*>(t);
  asm("vbroadcasti128 %[t0], %[sum]\n\tvpshufb %[i0], %[sum], %[sum]\n\t"
      "vbroadcasti128 %[t1], %[entry]\n\tvpshufb %[i1], %[entry], %[entry]\n\tvpaddb %[entry], %[sum], %[sum]\n\t"
      "vbroadcasti128 %[t2], %[entry]\n\tvpshufb %[i2], %[entry], %[entry]\n\tvpaddb %[entry], %[sum], %[sum]\n\t"
      "vbroadcasti128 %[t3], %[entry]\n\tvpshufb %[i3], %[entry], %[entry]\n\tvpaddb %[entry], %[sum], %[sum]\n\t"
      "vpmaddubsw %[signs], %[sum], %[sum]\n\tvpaddw %[sum], %[acc], %[acc]"
      : [acc] "+x"(acc), [sum] "=&x"(sum), [entry] "=&x"(entry)
      : [i0] "x"(i0), [i1] "x"(i1), [i2] "x"(i2), [i3] "x"(i3), [signs] "x"(signs),
        [t0] "m"(tables[0]), [t1] "m"(tables[1]), [t2] "m"(tables[2]), [t3] "m"(tables[3]));
}
inline void add_pairs(__m256i& acc, __m256i bytes, __m256i signs) {
  asm volatile("vpmaddubsw %[signs], %[bytes], %[bytes]\n\tvpaddw %[bytes], %[acc], %[acc]"
               : [acc] "+x"(acc), [bytes] "+x"(bytes)
               : [signs] "x"(signs)
               : "memory");
}
#else
inline void add_pairs(__m256i& acc, __m256i bytes, __m256i signs) {
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(bytes, signs));
}
inline void add_4(__m256i& acc, const uint8_t* t, __m256i i0, __m256i i1, __m256i i2, __m256i i3, __m256i signs) {
  const __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(table(t), i0), _mm256_shuffle_epi8(table(t + 16), i1));
  const __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(table(t + 32), i2), _mm256_shuffle_epi8(table(t + 48), i3));
  add_pairs(acc, _mm256_add_epi8(low, high), signs);
}
#endif

#define ENTRY(r, group) _mm256_shuffle_epi8(table(t + r * 64 + group * 16), i##group)
#define LOOK_UP_4(r) add_4(a##r, t + r * 64, i0, i1, i2, i3, signs);
#define LOOK_UP_2(r)                                                                                      \
  add_pairs(a##r, _mm256_add_epi8(ENTRY(r, 0), ENTRY(r, 1)), signs);                                      \
  add_pairs(a##r, _mm256_add_epi8(ENTRY(r, 2), ENTRY(r, 3)), signs);
#define LOOK_UP_1(r)                                                                                      \
  add_pairs(a##r, ENTRY(r, 0), signs);                                                                    \
  add_pairs(a##r, ENTRY(r, 1), signs);                                                                    \
  add_pairs(a##r, ENTRY(r, 2), signs);                                                                    \
  add_pairs(a##r, ENTRY(r, 3), signs);
#define ZERO(r) __m256i a##r = _mm256_setzero_si256();
#define WIDEN(r)                                                                                          \
  {                                                                                                       \
    const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(a##r));                              \
    const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a##r, 1));                        \
    to[2 * r] = first ? low : _mm256_add_epi32(to[2 * r], low);                                           \
    to[2 * r + 1] = first ? high : _mm256_add_epi32(to[2 * r + 1], high);                                 \
  }
#define KERNEL(D, R)                                                                                      \
  void look_up_##D##_##R(const uint8_t* t, const uint8_t* w, const uint8_t*, int64_t steps, bool first,   \
                         int32_t* sums) {                                                                 \
    const __m256i nibble = _mm256_set1_epi8(15), signs = _mm256_set1_epi16(-255); /* bytes 1, -1 */       \
    FXQUANT_ROWS_##R(ZERO) for (; steps > 0; steps--, t += kLutRows * 64, w += 64) {                      \
      __m256i i1 = load(w), i3 = load(w + 32);                                                            \
      const __m256i i0 = _mm256_and_si256(i1, nibble), i2 = _mm256_and_si256(i3, nibble);                 \
      i1 = _mm256_and_si256(_mm256_srli_epi16(i1, 4), nibble);                                            \
      i3 = _mm256_and_si256(_mm256_srli_epi16(i3, 4), nibble);                                            \
      FXQUANT_ROWS_##R(LOOK_UP_##D)                                                                       \
    }                                                                                                     \
    __m256i* to = reinterpret_cast<__m256i*>(sums);                                                       \
    FXQUANT_ROWS_##R(WIDEN)                                                                               \
  }
#define BY_ROWS(D) \
  KERNEL(D, 1) KERNEL(D, 2) KERNEL(D, 3) KERNEL(D, 4) KERNEL(D, 5) KERNEL(D, 6) KERNEL(D, 7) KERNEL(D, 8)
BY_ROWS(1) BY_ROWS(2) BY_ROWS(4)

#define NAMES(D)                                                                                          \
  {look_up_##D##_1, look_up_##D##_2, look_up_##D##_3, look_up_##D##_4,                                    \
   look_up_##D##_5, look_up_##D##_6, look_up_##D##_7, look_up_##D##_8}

}  // namespace

const LutKernels kLutAvx2 = {build, {NAMES(1), NAMES(2), NAMES(4)}, 1};

}  // namespace fxquant
