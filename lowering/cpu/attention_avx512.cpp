// AVX-512: 12 x 32 tiles.
#include "attention_avx2.h"
#include "attention_kernels.h"
#include "attention_log_kernels.h"

namespace fxquant::attention {
namespace {

struct Zmm {
  static constexpr int64_t kLanes = 16, kBlock = 8;
  __m512 v;

  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Zmm load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static void store(float* p, Zmm a) { _mm512_storeu_ps(p, a.v); }
  static Zmm load_part(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static void store_part(float* p, Zmm a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
  static Zmm set1(float s) { return {_mm512_set1_ps(s)}; }
  static Zmm add(Zmm a, Zmm b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Zmm sub(Zmm a, Zmm b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Zmm mul(Zmm a, Zmm b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Zmm max(Zmm a, Zmm b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Zmm min(Zmm a, Zmm b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Zmm div(Zmm a, Zmm b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Zmm fma(Zmm a, Zmm b, Zmm c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Zmm eighths(Zmm n) {
    const __m512i bits = _mm512_castps_si512(n.v), table = _mm512_load_si512(kEighths);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_permutexvar_epi32(bits, table), _mm512_slli_epi32(bits, 20)))};
  }
  static __m512i rounded(Zmm a) { return _mm512_cvtps_epi32(a.v); }
  static void store_words(int32_t* p, __m512i words) { _mm512_storeu_si512(p, words); }
  static Zmm look_up_short(const float* table, __m512i words) {
    const __mmask16 is_there = _mm512_cmplt_epi32_mask(words, _mm512_set1_epi32(kShortTable));
    return {_mm512_maskz_permutexvar_ps(is_there, words, _mm512_loadu_ps(table))};
  }
  static Zmm look_up(const float* table, __m512i words) { return {_mm512_i32gather_ps(words, table, 4)}; }
  static __m256 high_half(Zmm a) { return _mm512_extractf32x8_ps(a.v, 1); }
  static __m256 halves(Zmm a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), high_half(a)); }
  static float front(Zmm a) { return _mm512_cvtss_f32(a.v); }
  static Zmm first_or(Zmm a, int64_t n, Zmm b) { return {_mm512_mask_mov_ps(b.v, first(n), a.v)}; }
  static Zmm highest(Zmm a) {
    const __m256 high = attention::highest(_mm256_max_ps(_mm512_castps512_ps256(a.v), high_half(a)));
    return {_mm512_broadcast_f32x8(high)};
  }
  static float sum(Zmm a) { return attention::sum(halves(a)); }
  static Zmm hidden(Zmm m) {
    const __m512 none = _mm512_set1_ps(kHidden);
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(m.v, none, _CMP_EQ_OQ), none)};
  }
  static Zmm hidden(const uint8_t* m) {
    const __mmask16 is_hidden = _mm_testn_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m)), _mm_set1_epi8(-1));
    return {_mm512_maskz_mov_ps(is_hidden, _mm512_set1_ps(kHidden))};
  }
  static void sum4(Zmm a, Zmm b, Zmm c, Zmm d, float* to) { attention::sum4(halves(a), halves(b), halves(c), halves(d), to); }
  static void transpose(const float* a, int64_t ld, float factor, float* to, int64_t ldt) {
    transpose8(a, ld, factor, to, ldt);
  }
};

FXQUANT_PRODUCT(1) FXQUANT_PRODUCT(2) FXQUANT_PRODUCT(3) FXQUANT_PRODUCT(4) FXQUANT_PRODUCT(5) FXQUANT_PRODUCT(6)
FXQUANT_PRODUCT(7) FXQUANT_PRODUCT(8) FXQUANT_PRODUCT(9) FXQUANT_PRODUCT(10) FXQUANT_PRODUCT(11) FXQUANT_PRODUCT(12)
constexpr ProductFn kProducts[] = {
    product_1<Zmm>, product_2<Zmm>, product_3<Zmm>, product_4<Zmm>, product_5<Zmm>, product_6<Zmm>,
    product_7<Zmm>, product_8<Zmm>, product_9<Zmm>, product_10<Zmm>, product_11<Zmm>, product_12<Zmm>,
};

}  // namespace

const Kernels kAvx512 = kernels<Zmm>(12, kProducts);
const LogKernels kLogAvx512 = log_kernels<Zmm>();

}  // namespace fxquant::attention
