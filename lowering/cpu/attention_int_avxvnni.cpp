// AVX-VNNI: vpdpbusd adds four byte products to a 32-bit lane, exactly; 6 x 16 tiles.
#include "attention_int_avx2.h"

namespace fxquant::attention {
namespace {

inline __m256i dot(__m256i acc, __m256i x, __m256i w) {
#ifdef FXQUANT_SIMDE
  return simde_mm256_dpbusd_epi32(acc, x, w);
#else
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#endif
}

#define START(r) __m256i a##r = start0, b##r = start1;
#define DOT(r)                                                 \
  {                                                            \
    const __m256i x = broadcast_word(codes + r * stride + s * 4); \
    a##r = dot(a##r, x, w0);                                   \
    b##r = dot(b##r, x, w1);                                   \
  }
#define STORE(r)                                            \
  store_scores(out + r * ldo, a##r, row_scales[r], key_scales); \
  store_scores(out + r * ldo + 8, b##r, row_scales[r], key_scales + 8);
#define SCORE(R)                                                                                       \
  void score_##R(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t words,            \
                 const float* row_scales, const float* key_scales, float* out, int64_t ldo) {          \
    const __m256i start0 = load256(panel), start1 = load256(panel + 32);                               \
    const uint8_t* w = panel + 64;                                                                     \
    FXQUANT_ROWS_##R(START) for (int64_t s = 0; s < words; s++, w += 64) {                             \
      const __m256i w0 = load256(w), w1 = load256(w + 32);                                             \
      FXQUANT_ROWS_##R(DOT)                                                                            \
    }                                                                                                  \
    FXQUANT_ROWS_##R(STORE)                                                                            \
  }
SCORE(1) SCORE(2) SCORE(3) SCORE(4) SCORE(5) SCORE(6)
constexpr ScoreFn kTiles[] = {score_1, score_2, score_3, score_4, score_5, score_6};

// A sum starts at -offset times the sum of its key's codes.
template <int32_t kBits>
void start(uint8_t* panel, int64_t words) {
  const __m256i offset = _mm256_set1_epi8(static_cast<char>(code_offset(kBits)));
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t s = 0; s < words; s++) {
    a = dot(a, offset, load256(panel + 64 + s * 64));
    b = dot(b, offset, load256(panel + 96 + s * 64));
  }
  store256(panel, _mm256_sub_epi32(_mm256_setzero_si256(), a));
  store256(panel + 32, _mm256_sub_epi32(_mm256_setzero_si256(), b));
}

#define ZERO(r) __m256i a##r = _mm256_setzero_si256(), b##r = a##r;
#define STORE_MIX(r) store_mix(out + r * ldo, a##r, first), store_mix(out + r * ldo + 8, b##r, first);
#define MIX(R)                                                                                                 \
  void mix_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t words, float* out, int64_t ldo, \
               bool first) {                                                                                   \
    FXQUANT_ROWS_##R(ZERO) for (int64_t s = 0; s < words; s++, w += 64) {                                      \
      const __m256i w0 = load256(w), w1 = load256(w + 32);                                                     \
      FXQUANT_ROWS_##R(DOT)                                                                                    \
    }                                                                                                          \
    FXQUANT_ROWS_##R(STORE_MIX)                                                                                \
  }
MIX(1) MIX(2) MIX(3) MIX(4) MIX(5) MIX(6)
constexpr MixFn kMixes[] = {mix_1, mix_2, mix_3, mix_4, mix_5, mix_6};

}  // namespace

const IntKernels kIntAvxVnni = {6,
                                {1, code_offset(6), 0, kTiles, start<6>},
                                {1, code_offset(8), 0, kTiles, start<8>},
                                {1, kMixes, weigh<1>, extents, pack_values<1>},
                                sum_keys,
                                quantize,
                                encode_codes,
                                pack};

}  // namespace fxquant::attention
