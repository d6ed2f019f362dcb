// Quantizing and packing on 256-bit vectors, shared by the AVX2 path and those with VNNI.
#pragma once
#include "attention_avx2.h"
#include "attention_int_table.h"
#include "rows.h"
#include "simd.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fxquant::attention {
namespace {

inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline __m256i broadcast_word(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

void sum_keys(const float* k, int64_t ld, int64_t keys, int64_t depth, float* to) {
  int64_t c = 0;
  for (; c + 32 <= depth; c += 32) {  // four independent sums hide the latency of one
    __m256 a = _mm256_setzero_ps(), b = a, d = a, e = a;
    for (int64_t j = 0; j < keys; j++) {
      const float* row = k + j * ld + c;
      a = _mm256_add_ps(a, _mm256_loadu_ps(row)), b = _mm256_add_ps(b, _mm256_loadu_ps(row + 8));
      d = _mm256_add_ps(d, _mm256_loadu_ps(row + 16)), e = _mm256_add_ps(e, _mm256_loadu_ps(row + 24));
    }
    _mm256_storeu_ps(to + c, a), _mm256_storeu_ps(to + c + 8, b);
    _mm256_storeu_ps(to + c + 16, d), _mm256_storeu_ps(to + c + 24, e);
  }
  for (; c < depth; c += 8) {
    const __m256i mask = first_lanes(depth - c);
    __m256 a = _mm256_setzero_ps();
    for (int64_t j = 0; j < keys; j++) a = _mm256_add_ps(a, _mm256_maskload_ps(k + j * ld + c, mask));
    _mm256_maskstore_ps(to + c, mask, a);
  }
}

// x - mean into `work`, and the largest magnitude as bits: an infinity or NaN is above every finite number.
inline int32_t centre(const float* x, const float* mean, int64_t depth, float* work) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i bits = _mm256_setzero_si256();
  int64_t c = 0;
  for (; c + 8 <= depth; c += 8) {
    __m256 v = _mm256_loadu_ps(x + c);
    if (mean != nullptr) v = _mm256_sub_ps(v, _mm256_loadu_ps(mean + c));
    _mm256_storeu_ps(work + c, v);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  }
  if (c < depth) {
    const __m256i mask = first_lanes(depth - c);
    __m256 v = _mm256_maskload_ps(x + c, mask);
    if (mean != nullptr) v = _mm256_sub_ps(v, _mm256_maskload_ps(mean + c, mask));
    _mm256_maskstore_ps(work + c, mask, v);
    bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  }
  __m128i high = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  high = _mm_max_epi32(high, _mm_shuffle_epi32(high, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(high, _mm_shuffle_epi32(high, 0xb1)));
}

inline __m256i codes8(const float* x, __m256 inverse) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), inverse));
}

// Bytes or 16-bit words of the codes of x * inverse, plus the offset.
inline void encode(const float* x, int64_t depth, float scale, int32_t offset, int64_t code_bytes, uint8_t* to) {
  const __m256 inverse = _mm256_set1_ps(scale);
  int64_t c = 0;
  if (code_bytes == 1) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), added = _mm256_set1_epi8(static_cast<char>(offset));
    for (; c + 32 <= depth; c += 32) {
      const __m256i low = _mm256_packs_epi32(codes8(x + c, inverse), codes8(x + c + 8, inverse));
      const __m256i high = _mm256_packs_epi32(codes8(x + c + 16, inverse), codes8(x + c + 24, inverse));
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      store256(to + c, _mm256_add_epi8(bytes, added));
    }
  } else {
    for (; c + 16 <= depth; c += 16) {
      const __m256i words = _mm256_packs_epi32(codes8(x + c, inverse), codes8(x + c + 8, inverse));
      store256(to + 2 * c, _mm256_permute4x64_epi64(words, 0xd8));
    }
  }
  for (; c < depth; c++) {
    const int32_t code = _mm_cvtss_si32(_mm_set_ss(x[c] * scale)) + offset;
    std::memcpy(to + c * code_bytes, &code, code_bytes);
  }
}

float quantize(const float* x, const float* mean, int64_t depth, int32_t bits, int32_t offset, int64_t code_bytes,
               float* work, uint8_t* to) {
  const int64_t bytes = depth * code_bytes, padded = (bytes + 3) / 4 * 4;
  const int32_t found = centre(x, mean, depth, work);
  std::memset(to + bytes, 0, padded - bytes);
  if (found >= 0x7f800000) {
    std::memset(to, code_bytes == 1 ? offset : 0, bytes);
    return std::numeric_limits<float>::quiet_NaN();
  }
  float largest;
  std::memcpy(&largest, &found, 4);
  largest = std::max(largest, kSmallest);
  const float top = static_cast<float>(top_code(bits));
  encode(work, depth, top / largest, offset, code_bytes, to);
  return largest / top;
}

void pack(const uint8_t* rows, int64_t stride, int64_t words, uint8_t* to) {
  int64_t w = 0;
  for (; w + 8 <= words; w += 8)  // the transpose moves words without looking at them
    for (int64_t j = 0; j < kPanelKeys; j += 8)
      transpose8(reinterpret_cast<const float*>(rows + j * stride + w * 4), stride / 4,
                 reinterpret_cast<float*>(to + (w * kPanelKeys + j) * 4), kPanelKeys);
  for (; w < words; w++)
    for (int64_t j = 0; j < kPanelKeys; j++) std::memcpy(to + (w * kPanelKeys + j) * 4, rows + j * stride + w * 4, 4);
}

// Scores of eight keys of a row from their sums.
inline void store_scores(float* to, __m256i sums, float row_scale, const float* key_scales) {
  const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(row_scale), _mm256_loadu_ps(key_scales));
  _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale));
}

}  // namespace
}  // namespace fxquant::attention
