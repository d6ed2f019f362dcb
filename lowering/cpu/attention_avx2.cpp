// AVX2 and FMA: 6 x 16 tiles.
#include "attention_avx2.h"
#include "attention_kernels.h"
#include "attention_log_kernels.h"

namespace fxquant::attention {
namespace {

struct Ymm {
  static constexpr int64_t kLanes = 8, kBlock = 8;
  __m256 v;

  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Ymm load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static void store(float* p, Ymm a) { _mm256_storeu_ps(p, a.v); }
  static Ymm load_part(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first(n))}; }
  static void store_part(float* p, Ymm a, int64_t n) { _mm256_maskstore_ps(p, first(n), a.v); }
  static Ymm set1(float s) { return {_mm256_set1_ps(s)}; }
  static Ymm add(Ymm a, Ymm b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Ymm sub(Ymm a, Ymm b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Ymm mul(Ymm a, Ymm b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Ymm max(Ymm a, Ymm b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Ymm min(Ymm a, Ymm b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Ymm div(Ymm a, Ymm b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Ymm fma(Ymm a, Ymm b, Ymm c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Ymm eighths(Ymm n) {
    const __m256i bits = _mm256_castps_si256(n.v), table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, bits), _mm256_slli_epi32(bits, 20)))};
  }
  static __m256i rounded(Ymm a) { return _mm256_cvtps_epi32(a.v); }
  static void store_words(int32_t* p, __m256i words) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words); }
  static Ymm look_up_short(const float* table, __m256i words) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), words);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), words);
    const __m256 found = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28)));  // by bit 3
    return {_mm256_and_ps(found, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(kShortTable), words)))};
  }
  static Ymm look_up(const float* table, __m256i words) { return {_mm256_i32gather_ps(table, words, 4)}; }
  static float front(Ymm a) { return _mm256_cvtss_f32(a.v); }
  static Ymm first_or(Ymm a, int64_t n, Ymm b) { return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(first(n)))}; }
  static Ymm highest(Ymm a) { return {attention::highest(a.v)}; }
  static float sum(Ymm a) { return attention::sum(a.v); }
  static Ymm hidden(Ymm m) {
    const __m256 none = _mm256_set1_ps(kHidden);
    return {_mm256_and_ps(_mm256_cmp_ps(m.v, none, _CMP_EQ_OQ), none)};
  }
  static Ymm hidden(const uint8_t* m) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(m)));
    const __m256i is_hidden = _mm256_cmpeq_epi32(bytes, _mm256_setzero_si256());
    return {_mm256_and_ps(_mm256_castsi256_ps(is_hidden), _mm256_set1_ps(kHidden))};
  }
  static void sum4(Ymm a, Ymm b, Ymm c, Ymm d, float* to) { attention::sum4(a.v, b.v, c.v, d.v, to); }
  static void transpose(const float* a, int64_t ld, float factor, float* to, int64_t ldt) {
    transpose8(a, ld, factor, to, ldt);
  }
};

FXQUANT_PRODUCT(1) FXQUANT_PRODUCT(2) FXQUANT_PRODUCT(3) FXQUANT_PRODUCT(4) FXQUANT_PRODUCT(5) FXQUANT_PRODUCT(6)
constexpr ProductFn kProducts[] = {
    product_1<Ymm>, product_2<Ymm>, product_3<Ymm>, product_4<Ymm>, product_5<Ymm>, product_6<Ymm>,
};

}  // namespace

const Kernels kAvx2 = kernels<Ymm>(6, kProducts);
const LogKernels kLogAvx2 = log_kernels<Ymm>();

}  // namespace fxquant::attention
