// Row quantization and the float epilogue on 256-bit vectors, shared by the AVX2 and AVX-VNNI paths.
#pragma once
#include "layout.h"
#include "simd.h"

#include <algorithm>
#include <cstring>

namespace fxquant::avx2 {

inline __m256i tail_mask(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline float lowest(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  return *std::min_element(lanes, lanes + 8);
}

inline float highest(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  return *std::max_element(lanes, lanes + 8);
}

inline int32_t highest(__m256i v) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return *std::max_element(lanes, lanes + 8);
}

// Extent of a row: lowest and highest value with zero among them; false where a value is not finite.
inline bool extent(const float* x, int64_t k, float* low, float* high) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256 low0 = _mm256_setzero_ps(), low1 = low0, high0 = low0, high1 = low0;
  __m256i bits0 = _mm256_setzero_si256(), bits1 = bits0;
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    low0 = _mm256_min_ps(low0, a), low1 = _mm256_min_ps(low1, b);
    high0 = _mm256_max_ps(high0, a), high1 = _mm256_max_ps(high1, b);
    bits0 = _mm256_max_epi32(bits0, _mm256_and_si256(_mm256_castps_si256(a), magnitude));
    bits1 = _mm256_max_epi32(bits1, _mm256_and_si256(_mm256_castps_si256(b), magnitude));
  }
  for (; i < k; i += 8) {
    const __m256 a = _mm256_maskload_ps(x + i, tail_mask(k - i));
    low0 = _mm256_min_ps(low0, a);
    high0 = _mm256_max_ps(high0, a);
    bits0 = _mm256_max_epi32(bits0, _mm256_and_si256(_mm256_castps_si256(a), magnitude));
  }
  *low = lowest(_mm256_min_ps(low0, low1));
  *high = highest(_mm256_max_ps(high0, high1));
  return highest(_mm256_max_epi32(bits0, bits1)) < 0x7f800000;
}

// rne(quotient) + zero of 8 values as int32.
inline __m256i code8(__m256 quotient, __m256i zero) {
  const __m256 above = _mm256_max_ps(quotient, _mm256_set1_ps(-kFarthest));
  return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(above, _mm256_set1_ps(kFarthest))), zero);
}

// Quotients by one step. True division: a reciprocal with a check for ties was slower (Zen 4).
struct ByOne {
  __m256 step;

  __m256 operator()(const float* x, int64_t i) { return _mm256_div_ps(_mm256_loadu_ps(x + i), step); }
  __m256 operator()(const float* x, int64_t i, __m256i mask) {
    return _mm256_div_ps(_mm256_maskload_ps(x + i, mask), step);
  }
};

// Quotients by a step a channel; remembers the largest magnitude. Lanes off the mask divide zero by zero: nobody reads them.
struct ByChannel {
  const float* steps;
  __m256i bits = _mm256_setzero_si256();

  __m256 divide(__m256 x, __m256 step) {
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
    return _mm256_div_ps(x, step);
  }
  __m256 operator()(const float* x, int64_t i) { return divide(_mm256_loadu_ps(x + i), _mm256_loadu_ps(steps + i)); }
  __m256 operator()(const float* x, int64_t i, __m256i mask) {
    return divide(_mm256_maskload_ps(x + i, mask), _mm256_maskload_ps(steps + i, mask));
  }
};

template <typename Quotient>
inline void encode_by(Quotient& quotient, const float* x, int64_t k, int32_t qmax, int32_t zero_point, uint8_t* codes) {
  const __m256i zero = _mm256_set1_epi32(zero_point), top = _mm256_set1_epi8(static_cast<char>(qmax));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256i a = code8(quotient(x, i), zero), b = code8(quotient(x, i + 8), zero);
    const __m256i c = code8(quotient(x, i + 16), zero), d = code8(quotient(x, i + 24), zero);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));  // clips to 0 .. 255
    const __m256i codes32 = _mm256_permutevar8x32_epi32(_mm256_min_epu8(bytes, top), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), codes32);
  }
  alignas(32) int32_t lanes[8];
  for (; i < k; i += 8) {
    const int64_t left = std::min<int64_t>(8, k - i);
    const __m256i q = code8(quotient(x, i, tail_mask(left)), zero);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), q);
    for (int64_t j = 0; j < left; j++) codes[i + j] = static_cast<uint8_t>(std::clamp(lanes[j], 0, qmax));
  }
  std::memset(codes + k, 0, padded_features(k) - k);
}

inline void encode(const float* x, int64_t k, int32_t qmax, float scale, int32_t zero_point, uint8_t* codes) {
  ByOne quotient{_mm256_set1_ps(scale)};
  encode_by(quotient, x, k, qmax, zero_point, codes);
}

inline bool encode_channels(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes) {
  ByChannel quotient{steps};
  encode_by(quotient, x, k, qmax, zero_point, codes);
  return highest(quotient.bits) < 0x7f800000;
}

inline void finish(const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
                   const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out,
                   int64_t ldo) {
  for (int64_t h = 0; h < columns; h += 8) {
    const __m256i sum_w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_sums + h));
    const __m256 sw = _mm256_loadu_ps(scale_w + h);
    const __m256i mask = tail_mask(columns - h);
    const __m256 added = bias ? _mm256_maskload_ps(bias + h, mask) : _mm256_setzero_ps();
    for (int64_t r = 0; r < rows; r++) {
      const __m256i shift = _mm256_mullo_epi32(_mm256_set1_epi32(zero_points[r]), sum_w);
      const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * kPanel + h));
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, shift)),
                               _mm256_mul_ps(_mm256_set1_ps(scale_x[r]), sw));
      if (bias) y = _mm256_add_ps(y, added);  // adding a zero instead would lose the sign of -0
      float* to = out + r * ldo + h;
      if (columns - h >= 8)
        _mm256_storeu_ps(to, y);
      else
        _mm256_maskstore_ps(to, mask, y);
    }
  }
}

}  // namespace fxquant::avx2
