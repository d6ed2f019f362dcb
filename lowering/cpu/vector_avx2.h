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
  static VectorAvx2 scaled(VectorAvx2 m, VectorAvx2 n) {
    const VectorAvx2 biased = max(n, set(-127.0f)) + set(kMagic);
    return m * VectorAvx2{_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(biased.v), 23))};
  }

  // e^x by eighths of an exponent: 2^(k/8) comes from a table, and e^t for the small rest t needs degree 3 only. FMA and
  // multiplication share two units, look-up and integer addition have others. Biased: k/8 and the bits to build the
  // power from. At and below -88.03 k/8 is -127 and the power is exactly 0.
  static VectorAvx2 eighths(VectorAvx2 x) { return fma(x, set(kLog2E), set(kMagicEighths)); }
  static VectorAvx2 power(VectorAvx2 biased) {
    const __m256i bits = _mm256_castps_si256(biased.v);
    // 2^(j/8) without its exponent, and without the j/8 that the shifted bits add.
    const __m256i table = _mm256_setr_epi32(
        0x0, -0x46a3e, -0x7c810, -0xa0129, -0xafb0d, -0xa98d6, -0x8bb03, -0x53f39);
    const __m256i entry = _mm256_permutevar8x32_epi32(table, bits);  // of the lowest three bits
    return {_mm256_castsi256_ps(_mm256_add_epi32(entry, _mm256_slli_epi32(bits, 20)))};
  }
  static VectorAvx2 rest(VectorAvx2 x, VectorAvx2 biased) {
    const VectorAvx2 n = biased - set(kMagicEighths);
    return fma(n, set(kMinusLn2Low), fma(n, set(kMinusLn2High), x));
  }
  static VectorAvx2 polynomial(VectorAvx2 t) {
    return fma(fma(fma(set(kEighth3), t, set(kEighth2)), t, set(1.0f)), t, set(1.0f));
  }
  static VectorAvx2 exp_below(VectorAvx2 x) {
    x = max(set(-88.03f), x);
    const VectorAvx2 biased = eighths(x);
    return polynomial(rest(x, biased)) * power(biased);
  }
  static VectorAvx2 exp(VectorAvx2 x) { return exp_below(min(set(88.72f), x)); }
  static VectorAvx2 add_exp(VectorAvx2 sum, VectorAvx2 x) {
    x = max(set(-88.03f), x);
    const VectorAvx2 biased = eighths(x);
    const VectorAvx2 t = fma(biased - set(kMagicEighths), set(kMinusLn2High), x);
    return fma(polynomial(t), power(biased), sum);
  }
  struct Weighted;
};

struct VectorAvx2::Weighted {  // the factor is in the polynomial's coefficients
  VectorAvx2 c0, c2, c3;
  explicit Weighted(float f) : c0(set(f)), c2(set(f * kEighth2)), c3(set(f * kEighth3)) {}
  VectorAvx2 operator()(VectorAvx2 x) const {
    x = max(set(-88.03f), x);
    const VectorAvx2 biased = eighths(x), t = rest(x, biased);
    return fma(fma(fma(c3, t, c2), t, c0), t, c0) * power(biased);
  }
};

}  // namespace
}  // namespace fxquant
