// Quantizing and packing on 256-bit vectors, shared by the AVX2 path and those with VNNI.
#pragma once
#include "attention_avx2.h"
#include "attention_int_table.h"
#include "rows.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
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

inline __m256 centred(const float* x, const float* mean) {
  const __m256 v = _mm256_loadu_ps(x);
  return mean == nullptr ? v : _mm256_sub_ps(v, _mm256_loadu_ps(mean));
}
inline __m256 centred(const float* x, const float* mean, __m256i mask) {
  const __m256 v = _mm256_maskload_ps(x, mask);
  return mean == nullptr ? v : _mm256_sub_ps(v, _mm256_maskload_ps(mean, mask));
}
inline const float* at(const float* mean, int64_t c) { return mean == nullptr ? nullptr : mean + c; }

// The largest magnitude of x - mean, as bits: an infinity or NaN is above every finite number.
inline int32_t magnitude(const float* x, const float* mean, int64_t depth) {
  const __m256i sign_off = _mm256_set1_epi32(0x7fffffff);
  const auto bits_of = [&](__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), sign_off); };
  __m256i bits = _mm256_setzero_si256();
  int64_t c = 0;
  for (; c + 8 <= depth; c += 8) bits = _mm256_max_epi32(bits, bits_of(centred(x + c, at(mean, c))));
  if (c < depth) bits = _mm256_max_epi32(bits, bits_of(centred(x + c, at(mean, c), first_lanes(depth - c))));
  __m128i high = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  high = _mm_max_epi32(high, _mm_shuffle_epi32(high, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(high, _mm_shuffle_epi32(high, 0xb1)));
}

// The codes of one row, without those of the last values that fill no vector.
template <int64_t kBytes>
inline int64_t encode(const float* x, const float* mean, int64_t depth, __m256 inverse, int32_t offset, uint8_t* to) {
  const auto codes = [&](int64_t c) { return _mm256_cvtps_epi32(_mm256_mul_ps(centred(x + c, at(mean, c)), inverse)); };
  int64_t c = 0;
  if (kBytes == 1) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), added = _mm256_set1_epi8(static_cast<char>(offset));
    for (; c + 32 <= depth; c += 32) {
      const __m256i low = _mm256_packs_epi32(codes(c), codes(c + 8));
      const __m256i high = _mm256_packs_epi32(codes(c + 16), codes(c + 24));
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
      store256(to + c, _mm256_add_epi8(bytes, added));
    }
    return c;
  }
  for (; c + 16 <= depth; c += 16)
    store256(to + 2 * c, _mm256_permute4x64_epi64(_mm256_packs_epi32(codes(c), codes(c + 8)), 0xd8));
  return c;
}

template <int64_t kBytes>
inline void encode_row(const float* x, const float* mean, int64_t depth, float inverse, int32_t offset, uint8_t* to) {
  int64_t c = encode<kBytes>(x, mean, depth, _mm256_set1_ps(inverse), offset, to);
  for (; c < depth; c++) {
    const float value = mean == nullptr ? x[c] : x[c] - mean[c];
    const int32_t code = _mm_cvtss_si32(_mm_set_ss(value * inverse)) + offset;
    std::memcpy(to + c * kBytes, &code, kBytes);
  }
  for (int64_t i = depth * kBytes; i % 4 != 0; i++) to[i] = 0;
}

// Eight rows at a time, so that neither their divisions nor their loads wait for one another.
void quantize(const float* x, int64_t ld, int64_t rows, const float* mean, int64_t depth, const Coding& coding, uint8_t* to,
              int64_t stride, float* scales) {
  const __m256 top = _mm256_set1_ps(static_cast<float>(top_code(coding.bits))), smallest = _mm256_set1_ps(kSmallest);
  for (int64_t first = 0; first < rows; first += 8) {
    const int64_t count = std::min<int64_t>(8, rows - first);
    alignas(32) int32_t bits[8] = {};
    alignas(32) float inverse[8], scale[8];
    for (int64_t r = 0; r < count; r++) bits[r] = magnitude(x + (first + r) * ld, mean, depth);
    const __m256 largest = _mm256_max_ps(_mm256_castsi256_ps(load256(bits)), smallest);
    _mm256_store_ps(inverse, _mm256_div_ps(top, largest));
    _mm256_store_ps(scale, _mm256_div_ps(largest, top));
    for (int64_t r = 0; r < count; r++) {
      const float* row = x + (first + r) * ld;
      uint8_t* codes = to + (first + r) * stride;
      scales[first + r] = scale[r];
      if (bits[r] >= 0x7f800000) {
        scales[first + r] = std::numeric_limits<float>::quiet_NaN();
        std::memset(codes, 0, (depth * coding.code_bytes + 3) / 4 * 4);
        if (coding.code_bytes == 1) std::memset(codes, coding.offset, depth);
      } else if (coding.code_bytes == 1) {
        encode_row<1>(row, mean, depth, inverse[r], coding.offset, codes);
      } else {
        encode_row<2>(row, mean, depth, inverse[r], coding.offset, codes);
      }
    }
  }
}

void encode_codes(const float* codes, int64_t rows, int64_t depth, const Coding& coding, uint8_t* to, int64_t stride) {
  const auto encode = coding.code_bytes == 1 ? encode_row<1> : encode_row<2>;
  for (int64_t r = 0; r < rows; r++) encode(codes + r * depth, nullptr, depth, 1.f, coding.offset, to + r * stride);
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

inline float highest(__m256 v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

inline int32_t total(__m256i v) {
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

// rne(255 2^t) for t <= 0; the lowest int for NaN. Half the polynomial times 2^(n + 1), so that what is added to t is even:
// ties of n go to even numbers as they do in the scalar kernel.
inline __m256i weights8(__m256 t) {
  const __m256 round = _mm256_set1_ps(kRound + 128.f);
  t = _mm256_max_ps(_mm256_set1_ps(kFarBelow), t);  // NaN stays
  const __m256 rounded = _mm256_add_ps(t, round);   // n + 1 + 127 in the low bits
  const __m256 f = _mm256_sub_ps(t, _mm256_sub_ps(rounded, round));
  __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(kWeight3 / 2), f, _mm256_set1_ps(kWeight2 / 2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kWeight1 / 2));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kWeight0 / 2));
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(rounded), 23);
  return _mm256_cvtps_epi32(_mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

template <int64_t kBytes>
float weigh(float* s, int64_t count, int64_t padded, uint8_t* to, float* top, float* sum) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  std::fill(s + count, s + padded, kNone);
  __m256 high0 = _mm256_set1_ps(kNone), high1 = high0;
  for (int64_t j = 0; j < padded; j += 16) {  // the operand order forgets a NaN, whose weight is NaN then
    high0 = _mm256_max_ps(_mm256_loadu_ps(s + j), high0);
    high1 = _mm256_max_ps(_mm256_loadu_ps(s + j + 8), high1);
  }
  const float largest = std::max(*top, highest(_mm256_max_ps(high0, high1)));
  const float shift = largest == kNone ? 0.f : largest;  // a row with every key masked so far has weights 0
  const __m256 by = _mm256_set1_ps(shift);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sums = _mm256_setzero_si256(), seen = sums;
  for (int64_t j = 0; j < padded; j += 16) {
    const __m256i a = weights8(_mm256_sub_ps(_mm256_loadu_ps(s + j), by));
    const __m256i b = weights8(_mm256_sub_ps(_mm256_loadu_ps(s + j + 8), by));
    const __m256i mixed = _mm256_packs_epi32(a, b), w = _mm256_permute4x64_epi64(mixed, 0xd8);
    seen = _mm256_or_si256(seen, mixed);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(mixed, ones));
    if (kBytes == 2)
      store256(to + 2 * j, w);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
  }
  const bool is_number = (_mm256_movemask_epi8(seen) & static_cast<int32_t>(0xaaaaaaaau)) == 0;  // no sign bit of a word
  const float factor = *top == kNone ? 0.f : std::exp2(*top - shift);
  *top = largest;
  *sum = *sum * factor + (is_number ? static_cast<float>(total(sums)) : std::numeric_limits<float>::quiet_NaN());
  return factor;
}

void extents(const float* v, int64_t ld, int64_t keys, int64_t depth, float* low, float* high) {
  const __m256i sign_off = _mm256_set1_epi32(0x7fffffff), infinity = _mm256_set1_epi32(0x7f7fffff);
  for (int64_t c = 0; c < depth; c += 8) {
    const __m256i mask = first_lanes(depth - c);
    __m256 lowest = _mm256_maskload_ps(v + c, mask), highest = lowest;
    __m256i bits = _mm256_setzero_si256();
    for (int64_t j = 0; j < keys; j++) {
      const __m256 x = _mm256_maskload_ps(v + j * ld + c, mask);
      lowest = _mm256_min_ps(lowest, x), highest = _mm256_max_ps(highest, x);
      bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(x), sign_off));
    }
    const __m256 bad = _mm256_castsi256_ps(_mm256_cmpgt_epi32(bits, infinity));  // all bits set: a NaN
    _mm256_maskstore_ps(low + c, mask, _mm256_or_ps(lowest, bad));
    _mm256_maskstore_ps(high + c, mask, _mm256_or_ps(highest, bad));
  }
}

template <int64_t kBytes>
void pack_values(const float* v, int64_t ld, int64_t keys, int64_t depth, const float* centre, const float* inverse,
                 uint8_t* to, int64_t stride) {
  constexpr int64_t kKeys = 4 / kBytes, kBits = 8 * kBytes;
  const __m256i low_bits = _mm256_set1_epi32((1 << kBits) - 1);
  for (int64_t c = 0; c < (depth + 15) / 16 * 16; c += 8) {
    const __m256 middle = _mm256_loadu_ps(centre + c), by = _mm256_loadu_ps(inverse + c);
    const __m256i mask = first_lanes(depth - c);
    __m256i word = _mm256_setzero_si256();
    for (int64_t j = 0; j < keys && j < kKeys; j++) {
      const __m256 x = depth - c >= 8 ? _mm256_loadu_ps(v + j * ld + c) : _mm256_maskload_ps(v + j * ld + c, mask);
      const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(x, middle), by));
      word = _mm256_or_si256(word, _mm256_slli_epi32(_mm256_and_si256(code, low_bits), static_cast<int>(j * kBits)));
    }
    store256(to + c / 16 * stride + c % 16 * 4, word);
  }
}

// Eight channels of a row from their sums.
inline void store_mix(float* to, __m256i sums, bool first) {
  const __m256 value = _mm256_cvtepi32_ps(sums);
  _mm256_storeu_ps(to, first ? value : _mm256_add_ps(_mm256_loadu_ps(to), value));
}

}  // namespace
}  // namespace fxquant::attention
