// Sixteen floats; vector_scalar.h says what the names mean. For files that are compiled for AVX-512.
#pragma once
#include "exp_constants.h"
#include "simd.h"

#include <cstdint>

namespace fxquant {
namespace {

struct VectorAvx512 {
  using Number = float;
  static constexpr int64_t kWidth = 16;
  __m512 v;

  static __mmask16 mask(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1); }

  static VectorAvx512 set(float x) { return {_mm512_set1_ps(x)}; }
  static VectorAvx512 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static VectorAvx512 load_tail(const float* p, int64_t count, float fill) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask(count), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_tail(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, mask(count), v); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }

  friend VectorAvx512 operator+(VectorAvx512 a, VectorAvx512 b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend VectorAvx512 operator-(VectorAvx512 a, VectorAvx512 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend VectorAvx512 operator*(VectorAvx512 a, VectorAvx512 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend VectorAvx512 operator/(VectorAvx512 a, VectorAvx512 b) { return {_mm512_div_ps(a.v, b.v)}; }
  static VectorAvx512 fma(VectorAvx512 a, VectorAvx512 b, VectorAvx512 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static VectorAvx512 max(VectorAvx512 a, VectorAvx512 b) { return {_mm512_max_ps(a.v, b.v)}; }
  static VectorAvx512 min(VectorAvx512 a, VectorAvx512 b) { return {_mm512_min_ps(a.v, b.v)}; }

  static void split(VectorAvx512 x, VectorAvx512& m, VectorAvx512& n) {
    n = {_mm512_roundscale_ps((x * set(kLog2E)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    VectorAvx512 t = fma(n, set(kMinusLn2High), x);
    t = fma(n, set(kMinusLn2Low), t);
    VectorAvx512 p = fma(set(kC5), t, set(kC4));
    p = fma(p, t, set(kC3));
    p = fma(p, t, set(kC2));
    p = fma(p, t, set(kC1));
    m = fma(p, t, set(1.0f));
  }
  static VectorAvx512 scaled(VectorAvx512 m, VectorAvx512 n) { return {_mm512_scalef_ps(m.v, n.v)}; }
  // At -110 the result is less than half of the smallest denormal number: 0. At 89 it is above the largest float: inf.
  static VectorAvx512 exp(VectorAvx512 x) { return exp_below(min(set(89.0f), x)); }
  static VectorAvx512 exp_below(VectorAvx512 x) {
    VectorAvx512 m, n;
    split(max(set(-110.0f), x), m, n);
    return scaled(m, n);
  }
  static VectorAvx512 add_exp(VectorAvx512 sum, VectorAvx512 x) { return sum + exp_below(x); }
  struct Weighted;
};

struct VectorAvx512::Weighted {
  VectorAvx512 factor;
  explicit Weighted(float f) : factor(set(f)) {}
  VectorAvx512 operator()(VectorAvx512 x) const { return exp_below(x) * factor; }
};

}  // namespace
}  // namespace fxquant
