// AVX-512: 12 x 32 tiles.
#include "attention_avx2.h"
#include "attention_kernels.h"

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
  static Zmm fma(Zmm a, Zmm b, Zmm c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Zmm exponent(Zmm n) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(n.v), 23))}; }
  static __m256 halves(Zmm a) { return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); }
  static void sum4(Zmm a, Zmm b, Zmm c, Zmm d, float* to) { attention::sum4(halves(a), halves(b), halves(c), halves(d), to); }
  static void transpose(const float* a, int64_t ld, float* to, int64_t ldt) { transpose8(a, ld, to, ldt); }
};

FXQUANT_TILE(1) FXQUANT_TILE(2) FXQUANT_TILE(3) FXQUANT_TILE(4) FXQUANT_TILE(5) FXQUANT_TILE(6)
FXQUANT_TILE(7) FXQUANT_TILE(8) FXQUANT_TILE(9) FXQUANT_TILE(10) FXQUANT_TILE(11) FXQUANT_TILE(12)
constexpr TileFn kWide[] = {wide_1<Zmm>, wide_2<Zmm>, wide_3<Zmm>, wide_4<Zmm>,  wide_5<Zmm>,  wide_6<Zmm>,
                            wide_7<Zmm>, wide_8<Zmm>, wide_9<Zmm>, wide_10<Zmm>, wide_11<Zmm>, wide_12<Zmm>};
constexpr TileFn kNarrow[] = {narrow_1<Zmm>, narrow_2<Zmm>, narrow_3<Zmm>, narrow_4<Zmm>,  narrow_5<Zmm>,  narrow_6<Zmm>,
                              narrow_7<Zmm>, narrow_8<Zmm>, narrow_9<Zmm>, narrow_10<Zmm>, narrow_11<Zmm>, narrow_12<Zmm>};

}  // namespace

const Kernels kAvx512 = {32, 12, kWide, kNarrow, softmax<Zmm>, pack_keys<Zmm>, dot_rows<Zmm>, mix_rows<Zmm>};

}  // namespace fxquant::attention
