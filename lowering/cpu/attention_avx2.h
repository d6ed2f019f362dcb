// An 8 x 8 transpose, sums and maxima over lanes on 256-bit vectors, shared by the AVX2 and AVX-512 paths.
#pragma once
#include "simd.h"

#include <cstdint>

namespace fxquant::attention {

// load(p) reads eight values of a row.
template <typename Load>
inline void transpose8(const float* a, int64_t ld, float* to, int64_t ldt, Load load) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = load(a + i * ld);
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

// Words as they are: a product, even with 1, would change the bits of some.
inline void transpose8(const float* a, int64_t ld, float* to, int64_t ldt) {
  transpose8(a, ld, to, ldt, [](const float* p) { return _mm256_loadu_ps(p); });
}

inline void transpose8(const float* a, int64_t ld, float factor, float* to, int64_t ldt) {
  const __m256 by = _mm256_set1_ps(factor);
  transpose8(a, ld, to, ldt, [by](const float* p) { return _mm256_mul_ps(_mm256_loadu_ps(p), by); });
}

inline __m256 swapped_halves(__m256 a) { return _mm256_permute2f128_ps(a, a, 1); }

inline __m256 highest(__m256 a) {
  a = _mm256_max_ps(a, swapped_halves(a));
  a = _mm256_max_ps(a, _mm256_permute_ps(a, 0x4e));
  return _mm256_max_ps(a, _mm256_permute_ps(a, 0xb1));
}

inline float sum(__m256 a) {
  a = _mm256_add_ps(a, swapped_halves(a));
  a = _mm256_add_ps(a, _mm256_permute_ps(a, 0x4e));
  return _mm256_cvtss_f32(_mm256_add_ps(a, _mm256_permute_ps(a, 0xb1)));
}

inline void sum4(__m256 a, __m256 b, __m256 c, __m256 d, float* to) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

}  // namespace fxquant::attention
