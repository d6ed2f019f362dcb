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
  __m128 low = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  low = _mm_min_ps(low, _mm_movehl_ps(low, low));
  return _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
}

inline float highest(__m256 v) {
  __m128 high = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  high = _mm_max_ps(high, _mm_movehl_ps(high, high));
  return _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
}

// Whether a lane is NaN.
inline bool has_nan(__m256 v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }

// Extent of a row: lowest and highest value with zero among them; false where a value is not finite. A product with zero
// is NaN for such a value alone.
inline bool extent(const float* x, int64_t k, float* low, float* high) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 low0 = zero, low1 = zero, high0 = zero, high1 = zero, odd0 = zero, odd1 = zero, odd2 = zero, odd3 = zero;
  int64_t i = 0;
  for (; i + 32 <= k; i += 32) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    const __m256 c = _mm256_loadu_ps(x + i + 16), d = _mm256_loadu_ps(x + i + 24);
    low0 = _mm256_min_ps(_mm256_min_ps(low0, a), b), low1 = _mm256_min_ps(_mm256_min_ps(low1, c), d);
    high0 = _mm256_max_ps(_mm256_max_ps(high0, a), b), high1 = _mm256_max_ps(_mm256_max_ps(high1, c), d);
    odd0 = _mm256_fmadd_ps(a, zero, odd0), odd1 = _mm256_fmadd_ps(b, zero, odd1);
    odd2 = _mm256_fmadd_ps(c, zero, odd2), odd3 = _mm256_fmadd_ps(d, zero, odd3);
  }
  for (; i < k; i += 8) {
    const __m256 a = _mm256_maskload_ps(x + i, tail_mask(k - i));
    low0 = _mm256_min_ps(low0, a);
    high0 = _mm256_max_ps(high0, a);
    odd0 = _mm256_fmadd_ps(a, zero, odd0);
  }
  *low = lowest(_mm256_min_ps(low0, low1));
  *high = highest(_mm256_max_ps(high0, high1));
  const __m256 odd = _mm256_add_ps(_mm256_add_ps(odd0, odd1), _mm256_add_ps(odd2, odd3));
  return !has_nan(odd);
}

// rne(quotient) + zero of 8 values as int32; what lies far below is far below zero, as a conversion out of range gives
// the lowest int32.
inline __m256i code8(__m256 quotient, __m256i zero) {
  return _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_min_ps(quotient, _mm256_set1_ps(kFarthest))), zero);
}

// Quotients by one step, divided.
struct ByOne {
  __m256 step;

  __m256 operator()(const float* x, int64_t i) { return _mm256_div_ps(_mm256_loadu_ps(x + i), step); }
  __m256 operator()(const float* x, int64_t i, __m256i mask) {
    return _mm256_div_ps(_mm256_maskload_ps(x + i, mask), step);
  }
};

// The same integers without a division: a quotient by the rounded inverse, corrected by its exact remainder, rounds to
// the integer that the correctly rounded quotient rounds to. Checked for every mantissa of a step beside every tie n + 1/2
// (n < 256); a power of two changes nothing while no intermediate leaves the normal range.
struct ByInverse {
  __m256 step, inverse;

  static bool holds(float step) { return 0x1p-60f <= step && step <= 0x1p60f; }
  explicit ByInverse(float step_) : step(_mm256_set1_ps(step_)), inverse(_mm256_set1_ps(1.f / step_)) {}

  __m256 divide(__m256 x) const {
    const __m256 quotient = _mm256_mul_ps(x, inverse);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, step, x), inverse, quotient);
  }
  __m256 operator()(const float* x, int64_t i) { return divide(_mm256_loadu_ps(x + i)); }
  __m256 operator()(const float* x, int64_t i, __m256i mask) { return divide(_mm256_maskload_ps(x + i, mask)); }
};

// Quotients by a step a channel; remembers values that are not finite. Lanes off the mask divide zero by zero: nobody reads
// them.
struct ByChannel {
  const float* steps;
  __m256 odd = _mm256_setzero_ps();

  __m256 divide(__m256 x, __m256 step) {
    odd = _mm256_fmadd_ps(x, _mm256_setzero_ps(), odd);
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
  if (ByInverse::holds(scale)) {
    ByInverse quotient(scale);
    return encode_by(quotient, x, k, qmax, zero_point, codes);
  }
  ByOne quotient{_mm256_set1_ps(scale)};
  encode_by(quotient, x, k, qmax, zero_point, codes);
}

inline bool encode_channels(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes) {
  ByChannel quotient{steps};
  encode_by(quotient, x, k, qmax, zero_point, codes);
  return !has_nan(quotient.odd);
}

// 8 sums of a row, dequantized. Adding a zero bias instead of none would lose the sign of -0.
template <bool kBias>
inline __m256 dequantize8(const int32_t* sums, __m256i zero_point, __m256i sum_w, __m256 scale_x, __m256 scale_w, __m256 bias) {
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
  const __m256i sum = _mm256_sub_epi32(all, _mm256_mullo_epi32(zero_point, sum_w));
  const __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale_x, scale_w));
  return kBias ? _mm256_add_ps(y, bias) : y;
}

template <bool kBias>
inline void finish_rows(const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
                        const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out,
                        int64_t ldo) {
  const __m256i sum0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_sums));
  const __m256i sum1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(column_sums + 8));
  const __m256 scale0 = _mm256_loadu_ps(scale_w), scale1 = _mm256_loadu_ps(scale_w + 8);
  const __m256i mask0 = tail_mask(columns), mask1 = tail_mask(columns - 8);
  const __m256 bias0 = kBias ? _mm256_maskload_ps(bias, mask0) : scale0;
  const __m256 bias1 = kBias ? _mm256_maskload_ps(bias + 8, mask1) : scale1;
  for (int64_t r = 0; r < rows; r++, sums += kPanel, out += ldo) {
    const __m256i zero = _mm256_set1_epi32(zero_points[r]);
    const __m256 scale = _mm256_set1_ps(scale_x[r]);
    const __m256 y0 = dequantize8<kBias>(sums, zero, sum0, scale, scale0, bias0);
    const __m256 y1 = dequantize8<kBias>(sums + 8, zero, sum1, scale, scale1, bias1);
    if (columns == kPanel) {
      _mm256_storeu_ps(out, y0);
      _mm256_storeu_ps(out + 8, y1);
    } else {
      _mm256_maskstore_ps(out, mask0, y0);
      _mm256_maskstore_ps(out + 8, mask1, y1);
    }
  }
}

inline void finish(const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
                   const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out,
                   int64_t ldo) {
  (bias ? finish_rows<true> : finish_rows<false>)(sums, column_sums, scale_w, scale_x, zero_points, bias, rows, columns,
                                                  out, ldo);
}

}  // namespace fxquant::avx2
