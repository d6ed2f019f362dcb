// AVX2 and FMA: 6 x 16 tiles.
#include "attention_avx2.h"
#include "attention_kernels.h"

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
  static Ymm fma(Ymm a, Ymm b, Ymm c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Ymm exponent(Ymm n) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n.v), 23))}; }
  static void sum4(Ymm a, Ymm b, Ymm c, Ymm d, float* to) { attention::sum4(a.v, b.v, c.v, d.v, to); }
  static void transpose(const float* a, int64_t ld, float* to, int64_t ldt) { transpose8(a, ld, to, ldt); }
};

FXQUANT_TILE(1) FXQUANT_TILE(2) FXQUANT_TILE(3) FXQUANT_TILE(4) FXQUANT_TILE(5) FXQUANT_TILE(6)
constexpr TileFn kWide[] = {wide_1<Ymm>, wide_2<Ymm>, wide_3<Ymm>, wide_4<Ymm>, wide_5<Ymm>, wide_6<Ymm>};
constexpr TileFn kNarrow[] = {narrow_1<Ymm>, narrow_2<Ymm>, narrow_3<Ymm>, narrow_4<Ymm>, narrow_5<Ymm>, narrow_6<Ymm>};

}  // namespace

const Kernels kAvx2 = {16, 6, kWide, kNarrow, softmax<Ymm>, pack_keys<Ymm>, dot_rows<Ymm>, mix_rows<Ymm>};

}  // namespace fxquant::attention
