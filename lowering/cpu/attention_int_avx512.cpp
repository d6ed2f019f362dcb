// AVX512-VNNI: vpdpbusd adds four byte products to a 32-bit lane, exactly; 12 x 16 tiles.
#include "attention_int_avx2.h"

namespace fxquant::attention {
namespace {

#define START(r) __m512i a##r = begin;
#define DOT(r)                                                                                        \
  {                                                                                                   \
    int32_t word;                                                                                     \
    std::memcpy(&word, codes + r * stride + s * 4, 4);                                                \
    a##r = _mm512_dpbusd_epi32(a##r, _mm512_set1_epi32(word), w0);                                    \
  }
#define STORE(r) \
  _mm512_storeu_ps(out + r * ldo, _mm512_mul_ps(_mm512_cvtepi32_ps(a##r), _mm512_mul_ps(_mm512_set1_ps(row_scales[r]), scales)));
#define SCORE(R)                                                                                       \
  void score_##R(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t words,            \
                 const float* row_scales, const float* key_scales, float* out, int64_t ldo) {          \
    const __m512i begin = _mm512_loadu_si512(panel);                                                   \
    FXQUANT_ROWS_##R(START) for (int64_t s = 0; s < words; s++) {                                      \
      const __m512i w0 = _mm512_loadu_si512(panel + 64 + s * 64);                                      \
      FXQUANT_ROWS_##R(DOT)                                                                            \
    }                                                                                                  \
    const __m512 scales = _mm512_loadu_ps(key_scales);                                                 \
    FXQUANT_ROWS_##R(STORE)                                                                            \
  }
SCORE(1) SCORE(2) SCORE(3) SCORE(4) SCORE(5) SCORE(6) SCORE(7) SCORE(8) SCORE(9) SCORE(10) SCORE(11) SCORE(12)
constexpr ScoreFn kTiles[] = {score_1, score_2, score_3, score_4,  score_5,  score_6,
                              score_7, score_8, score_9, score_10, score_11, score_12};

// A sum starts at -offset times the sum of its key's codes.
template <int32_t kBits>
void start(uint8_t* panel, int64_t words) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(code_offset(kBits)));
  __m512i sum = _mm512_setzero_si512();
  for (int64_t s = 0; s < words; s++) sum = _mm512_dpbusd_epi32(sum, offset, _mm512_loadu_si512(panel + 64 + s * 64));
  _mm512_storeu_si512(panel, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
}

#define ZERO(r) __m512i a##r = _mm512_setzero_si512();
#define STORE_MIX(r)                                                                       \
  {                                                                                        \
    const __m512 value = _mm512_cvtepi32_ps(a##r);                                         \
    float* to = out + r * ldo;                                                             \
    _mm512_storeu_ps(to, first ? value : _mm512_add_ps(_mm512_loadu_ps(to), value));       \
  }
#define MIX(R)                                                                                                     \
  void mix_##R(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t words, float* out, int64_t ldo, \
               bool first) {                                                                                       \
    FXQUANT_ROWS_##R(ZERO) for (int64_t s = 0; s < words; s++) {                                                   \
      const __m512i w0 = _mm512_loadu_si512(panel + s * 64);                                                       \
      FXQUANT_ROWS_##R(DOT)                                                                                        \
    }                                                                                                              \
    FXQUANT_ROWS_##R(STORE_MIX)                                                                                    \
  }
MIX(1) MIX(2) MIX(3) MIX(4) MIX(5) MIX(6) MIX(7) MIX(8) MIX(9) MIX(10) MIX(11) MIX(12)
constexpr MixFn kMixes[] = {mix_1, mix_2, mix_3, mix_4, mix_5, mix_6, mix_7, mix_8, mix_9, mix_10, mix_11, mix_12};

}  // namespace

const IntKernels kIntAvx512 = {12,
                               {1, code_offset(6), 0, kTiles, start<6>},
                               {1, code_offset(8), 0, kTiles, start<8>},
                               {1, kMixes, weigh<1>, extents, pack_values<1>},
                               sum_keys,
                               quantize,
                               encode_codes,
                               pack};

}  // namespace fxquant::attention
