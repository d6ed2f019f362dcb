// Portable quantized attention: what the other instruction sets must equal.
#include "attention_int_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fxquant::attention {
namespace {

void sum_keys(const float* k, int64_t ld, int64_t keys, int64_t depth, float* to) {
  std::fill_n(to, depth, 0.f);
  for (int64_t j = 0; j < keys; j++)
    for (int64_t c = 0; c < depth; c++) to[c] += k[j * ld + c];
}

void quantize(const float* x, int64_t ld, int64_t rows, const float* mean, int64_t depth, const Coding& coding, uint8_t* to,
              int64_t stride, float* scales) {
  const float top = static_cast<float>(top_code(coding.bits));
  for (int64_t r = 0; r < rows; r++, x += ld, to += stride) {
    const auto centred = [&](int64_t c) { return mean == nullptr ? x[c] : x[c] - mean[c]; };
    float largest = kSmallest;
    bool finite = true;
    for (int64_t c = 0; c < depth; c++) {
      finite = finite && std::isfinite(centred(c));
      largest = std::max(largest, std::abs(centred(c)));
    }
    const float inverse = top / largest;
    for (int64_t c = 0; c < depth; c++)
      to[c] = static_cast<uint8_t>((finite ? static_cast<int32_t>(std::nearbyint(centred(c) * inverse)) : 0) + coding.offset);
    std::memset(to + depth, 0, (depth + 3) / 4 * 4 - depth);
    scales[r] = finite ? largest / top : std::numeric_limits<float>::quiet_NaN();
  }
}

void encode_codes(const float* codes, int64_t rows, int64_t depth, const Coding& coding, uint8_t* to, int64_t stride) {
  for (int64_t r = 0; r < rows; r++, codes += depth, to += stride) {
    for (int64_t c = 0; c < depth; c++) to[c] = static_cast<uint8_t>(static_cast<int32_t>(codes[c]) + coding.offset);
    std::memset(to + depth, 0, (depth + 3) / 4 * 4 - depth);
  }
}

void pack(const uint8_t* rows, int64_t stride, int64_t words, uint8_t* to) {
  for (int64_t w = 0; w < words; w++)
    for (int64_t j = 0; j < kPanelKeys; j++) std::memcpy(to + (w * kPanelKeys + j) * 4, rows + j * stride + w * 4, 4);
}

void score(const uint8_t* codes, int64_t, const uint8_t* panel, int64_t words, const float* row_scales,
           const float* key_scales, float* out, int64_t) {
  const int8_t *q = reinterpret_cast<const int8_t*>(codes), *k = reinterpret_cast<const int8_t*>(panel);
  for (int64_t j = 0; j < kPanelKeys; j++) {
    int32_t sum = 0;
    for (int64_t w = 0; w < words; w++)
      for (int64_t i = 0; i < 4; i++) sum += q[w * 4 + i] * k[(w * kPanelKeys + j) * 4 + i];
    out[j] = static_cast<float>(sum) * (row_scales[0] * key_scales[j]);
  }
}

uint8_t weight(float t) {
  t = t < kFarBelow ? kFarBelow : t;
  const float rounded = t + kRound, f = t - (rounded - kRound);
  const float p = std::fma(std::fma(std::fma(kWeight3, f, kWeight2), f, kWeight1), f, kWeight0);
  return static_cast<uint8_t>(std::nearbyint(std::ldexp(p, static_cast<int>(rounded - kRound))));
}

float weigh(float* s, int64_t count, int64_t padded, uint8_t* to, float* top, float* sum) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  float highest = *top;
  for (int64_t j = 0; j < count; j++) highest = highest < s[j] ? s[j] : highest;
  const float shift = highest == kNone ? 0.f : highest;  // a row with every key masked so far has weights 0
  int32_t total = 0;
  bool is_number = true;
  for (int64_t j = 0; j < padded; j++) {
    const float t = j < count ? s[j] - shift : kNone;
    to[j] = std::isnan(t) ? 0 : weight(t);
    is_number = is_number && !std::isnan(t);
    total += to[j];
  }
  const float factor = *top == kNone ? 0.f : std::exp2(*top - shift);
  *top = highest;
  *sum = *sum * factor + (is_number ? static_cast<float>(total) : std::numeric_limits<float>::quiet_NaN());
  return factor;
}

void extents(const float* v, int64_t ld, int64_t keys, int64_t depth, float* low, float* high) {
  for (int64_t c = 0; c < depth; c++) {
    low[c] = high[c] = v[c];
    bool finite = true;
    for (int64_t j = 0; j < keys; j++) {
      const float value = v[j * ld + c];
      finite = finite && std::isfinite(value);
      low[c] = std::min(low[c], value), high[c] = std::max(high[c], value);
    }
    if (!finite) low[c] = high[c] = std::numeric_limits<float>::quiet_NaN();
  }
}

void pack_values(const float* v, int64_t ld, int64_t keys, int64_t depth, const float* centre, const float* inverse,
                 uint8_t* to, int64_t stride) {
  for (int64_t c = 0; c < (depth + 15) / 16 * 16; c++)
    for (int64_t j = 0; j < 4; j++) {
      const float code = c < depth && j < keys ? (v[j * ld + c] - centre[c]) * inverse[c] : 0.f;
      to[c / 16 * stride + c % 16 * 4 + j] = static_cast<uint8_t>(std::isfinite(code) ? static_cast<int32_t>(std::nearbyint(code)) : 0);
    }
}

void mix(const uint8_t* weights, int64_t, const uint8_t* panel, int64_t words, float* out, int64_t, bool first) {
  const int8_t* v = reinterpret_cast<const int8_t*>(panel);
  for (int64_t c = 0; c < 16; c++) {
    int32_t sum = 0;
    for (int64_t w = 0; w < words; w++)
      for (int64_t i = 0; i < 4; i++) sum += weights[w * 4 + i] * v[(w * 16 + c) * 4 + i];
    out[c] = (first ? 0.f : out[c]) + static_cast<float>(sum);
  }
}

constexpr ScoreFn kTiles[] = {score};
constexpr Product kProduct = {1, 0, 0, kTiles, nullptr};
constexpr MixFn kMixes[] = {mix};

}  // namespace

const IntKernels kIntScalar = {
    1, kProduct, kProduct, {1, kMixes, weigh, extents, pack_values}, sum_keys, quantize, encode_codes, pack};

}  // namespace fxquant::attention
