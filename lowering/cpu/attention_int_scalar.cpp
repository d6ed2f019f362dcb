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

float quantize(const float* x, const float* mean, int64_t depth, int32_t bits, int32_t offset, int64_t, float* work,
               uint8_t* to) {
  float largest = kSmallest;
  bool finite = true;
  for (int64_t c = 0; c < depth; c++) {
    work[c] = mean == nullptr ? x[c] : x[c] - mean[c];
    finite = finite && std::isfinite(work[c]);
    largest = std::max(largest, std::abs(work[c]));
  }
  const float top = static_cast<float>(top_code(bits)), inverse = top / largest;
  for (int64_t c = 0; c < depth; c++)
    to[c] = static_cast<uint8_t>((finite ? static_cast<int32_t>(std::nearbyint(work[c] * inverse)) : 0) + offset);
  std::memset(to + depth, 0, (depth + 3) / 4 * 4 - depth);
  return finite ? largest / top : std::numeric_limits<float>::quiet_NaN();
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

constexpr ScoreFn kTiles[] = {score};
constexpr Product kProduct = {1, 0, 0, kTiles, nullptr};

}  // namespace

const IntKernels kIntScalar = {1, kProduct, kProduct, sum_keys, quantize, pack};

}  // namespace fxquant::attention
