// AVX2: 6-bit codes by vpmaddubsw in 16-bit segments, 8-bit codes by vpmaddwd; 6 x 16 tiles.
#include "attention_int_avx2.h"
#include "mac_avx2.h"

namespace fxquant::attention {
namespace {

using avx2::mac32;

// acc += maddubs(x, w) in 16 bits. The two-instruction form keeps gcc from hoisting loads and spilling accumulators.
inline void mac16(__m256i& acc, __m256i x, __m256i w) {
#if defined(__GNUC__) && !defined(FXQUANT_SIMDE)
  __m256i t;
  asm volatile("vpmaddubsw %[w], %[x], %[t]\n\tvpaddw %[t], %[acc], %[acc]"
               : [acc] "+x"(acc), [t] "=&x"(t)
               : [w] "x"(w), [x] "x"(x));
#else
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(x, w));
#endif
}

// R rows x 16 keys: whole segments but the last are kept as 32-bit sums in `wide`.
#define DECLARE(r) __m256i a##r, b##r;
#define START(r) a##r = w0, b##r = w1;
#define MAC16(r)                                                                              \
  {                                                                                           \
    const __m256i x = broadcast_word((r < 3 ? low : high) + (r < 3 ? r : r - 3) * stride);    \
    mac16(a##r, x, w0);                                                                       \
    mac16(b##r, x, w1);                                                                       \
  }
#define WIDEN(r) a##r = _mm256_madd_epi16(a##r, ones), b##r = _mm256_madd_epi16(b##r, ones);
#define ADD_WIDE(r) \
  a##r = _mm256_add_epi32(a##r, load256(wide + r * 16)), b##r = _mm256_add_epi32(b##r, load256(wide + r * 16 + 8));
#define KEEP(r) store256(wide + r * 16, a##r), store256(wide + r * 16 + 8, b##r);
#define STORE(r)                                            \
  store_scores(out + r * ldo, a##r, row_scales[r], key_scales); \
  store_scores(out + r * ldo + 8, b##r, row_scales[r], key_scales + 8);
#define SIX(R)                                                                                              \
  void six_##R(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t words,                   \
               const float* row_scales, const float* key_scales, float* out, int64_t ldo) {                 \
    const int64_t segments = (words + kSegment - 1) / kSegment;                                             \
    const uint8_t *low = codes, *high = codes + 3 * stride, *w = panel + segments * 64;                     \
    alignas(32) int32_t wide[R * 16];                                                                       \
    __m256i w0, w1;                                                                                         \
    FXQUANT_ROWS_##R(DECLARE) for (int64_t g = 0;;) {                                                       \
      w0 = load256(panel + g * 64), w1 = load256(panel + g * 64 + 32);                                      \
      FXQUANT_ROWS_##R(START) for (int64_t s = std::min(kSegment, words - g * kSegment); s > 0; s--) {      \
        w0 = load256(w), w1 = load256(w + 32);                                                              \
        FXQUANT_ROWS_##R(MAC16) w += 64, low += 4, high += 4;                                               \
      }                                                                                                     \
      const __m256i ones = _mm256_set1_epi16(1);                                                            \
      FXQUANT_ROWS_##R(WIDEN) if (g > 0) { FXQUANT_ROWS_##R(ADD_WIDE) }                                     \
      if (++g == segments) break;                                                                           \
      FXQUANT_ROWS_##R(KEEP)                                                                                \
    }                                                                                                       \
    FXQUANT_ROWS_##R(STORE)                                                                                 \
  }
SIX(1) SIX(2) SIX(3) SIX(4) SIX(5) SIX(6)
constexpr ScoreFn kSix[] = {six_1, six_2, six_3, six_4, six_5, six_6};

// A lane starts at -offset times the sum of its codes, so that it ends at the sum of products of signed codes.
void start_six(uint8_t* panel, int64_t words) {
  const int64_t segments = (words + kSegment - 1) / kSegment;
  const uint8_t* w = panel + segments * 64;
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(code_offset(6)));
  for (int64_t g = 0; g < segments; g++) {
    __m256i a = _mm256_setzero_si256(), b = a;
    for (int64_t s = std::min(kSegment, words - g * kSegment); s > 0; s--, w += 64) {
      a = _mm256_sub_epi16(a, _mm256_maddubs_epi16(offset, load256(w)));
      b = _mm256_sub_epi16(b, _mm256_maddubs_epi16(offset, load256(w + 32)));
    }
    store256(panel + g * 64, a), store256(panel + g * 64 + 32, b);
  }
}

#define ZERO(r) a##r = _mm256_setzero_si256(), b##r = a##r;
#define MAC32(r)                                                                              \
  {                                                                                           \
    const __m256i x = broadcast_word((r < 3 ? low : high) + (r < 3 ? r : r - 3) * stride);    \
    mac32(a##r, x, w0);                                                                       \
    mac32(b##r, x, w1);                                                                       \
  }
#define EIGHT(R)                                                                               \
  void eight_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t words,        \
                 const float* row_scales, const float* key_scales, float* out, int64_t ldo) {  \
    const uint8_t *low = codes, *high = codes + 3 * stride;                                    \
    __m256i w0, w1;                                                                            \
    FXQUANT_ROWS_##R(DECLARE) FXQUANT_ROWS_##R(ZERO) for (int64_t s = words; s > 0; s--) {     \
      w0 = load256(w), w1 = load256(w + 32);                                                   \
      FXQUANT_ROWS_##R(MAC32) w += 64, low += 4, high += 4;                                    \
    }                                                                                          \
    FXQUANT_ROWS_##R(STORE)                                                                    \
  }
EIGHT(1) EIGHT(2) EIGHT(3) EIGHT(4) EIGHT(5) EIGHT(6)
constexpr ScoreFn kEight[] = {eight_1, eight_2, eight_3, eight_4, eight_5, eight_6};

#define STORE_MIX(r) store_mix(out + r * ldo, a##r, first), store_mix(out + r * ldo + 8, b##r, first);
#define MIX(R)                                                                                                 \
  void mix_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t words, float* out, int64_t ldo, \
               bool first) {                                                                                   \
    const uint8_t *low = codes, *high = codes + 3 * stride;                                                    \
    __m256i w0, w1;                                                                                            \
    FXQUANT_ROWS_##R(DECLARE) FXQUANT_ROWS_##R(ZERO) for (int64_t s = words; s > 0; s--) {                     \
      w0 = load256(w), w1 = load256(w + 32);                                                                   \
      FXQUANT_ROWS_##R(MAC32) w += 64, low += 4, high += 4;                                                    \
    }                                                                                                          \
    FXQUANT_ROWS_##R(STORE_MIX)                                                                                \
  }
MIX(1) MIX(2) MIX(3) MIX(4) MIX(5) MIX(6)
constexpr MixFn kMixes[] = {mix_1, mix_2, mix_3, mix_4, mix_5, mix_6};

}  // namespace

const IntKernels kIntAvx2 = {6,
                             {1, code_offset(6), kSegment, kSix, start_six},
                             {2, 0, 0, kEight, nullptr},
                             {2, kMixes, weigh<2>, extents, pack_values<2>},
                             sum_keys,
                             quantize,
                             encode_codes,
                             pack};

}  // namespace fxquant::attention
