// Eight floats; vector_scalar.h says what the names mean. For files that are compiled for AVX2 and FMA.
#pragma once
#include "exp_constants.h"
#include "simd.h"

#include <cstdint>

namespace fxquant {
namespace {

struct VectorAvx2 {
  using Number = float;
  static constexpr int64_t kWidth = 8;
  __m256 v;

  static __m256i mask(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
  }

  static VectorAvx2 set(float x) { return {_mm256_set1_ps(x)}; }
  static VectorAvx2 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static VectorAvx2 load_tail(const float* p, int64_t count, float fill) {
    const __m256i m = mask(count);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, m), _mm256_castsi256_ps(m))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_tail(float* p, int64_t count) const { _mm256_maskstore_ps(p, mask(count), v); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  float sum() const {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
  }
  float largest() const {
    __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_max_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
  }

  friend VectorAvx2 operator+(VectorAvx2 a, VectorAvx2 b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend VectorAvx2 operator-(VectorAvx2 a, VectorAvx2 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend VectorAvx2 operator*(VectorAvx2 a, VectorAvx2 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend VectorAvx2 operator/(VectorAvx2 a, VectorAvx2 b) { return {_mm256_div_ps(a.v, b.v)}; }
  static VectorAvx2 fma(VectorAvx2 a, VectorAvx2 b, VectorAvx2 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static VectorAvx2 max(VectorAvx2 a, VectorAvx2 b) { return {_mm256_max_ps(a.v, b.v)}; }
  static VectorAvx2 min(VectorAvx2 a, VectorAvx2 b) { return {_mm256_min_ps(a.v, b.v)}; }

  // e^(x - n ln 2)
  static VectorAvx2 mantissa(VectorAvx2 x, VectorAvx2 n) {
    VectorAvx2 t = fma(n, set(kMinusLn2High), x);
    t = fma(n, set(kMinusLn2Low), t);
    VectorAvx2 p = fma(set(kC5), t, set(kC4));
    p = fma(p, t, set(kC3));
    p = fma(p, t, set(kC2));
    p = fma(p, t, set(kC1));
    return fma(p, t, set(1.0f));
  }
  static void split(VectorAvx2 x, VectorAvx2& m, VectorAvx2& n) {
    n = {_mm256_round_ps((x * set(kLog2E)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    m = mantissa(x, n);
  }
  static VectorAvx2 power(VectorAvx2 biased) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23))};
  }
  static VectorAvx2 scaled(VectorAvx2 m, VectorAvx2 n) { return m * power(max(n, set(-127.0f)) + set(kMagic)); }
  // Below -88.03 n is -127 and the power is 0; above 88.4 n is 128 and it is inf.
  static VectorAvx2 exp(VectorAvx2 x) {
    x = min(set(89.0f), max(set(-88.03f), x));
    const VectorAvx2 biased = fma(x, set(kLog2E), set(kMagic));
    return mantissa(x, biased - set(kMagic)) * power(biased);
  }
  // The same for x that is not above 0.
  static VectorAvx2 exp_below(VectorAvx2 x) {
    x = max(set(-88.03f), x);
    const VectorAvx2 biased = fma(x, set(kLog2E), set(kMagic));
    return mantissa(x, biased - set(kMagic)) * power(biased);
  }
};

}  // namespace
}  // namespace fxquant
