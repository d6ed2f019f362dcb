// The portable kernels: what every other path must equal, bit for bit.
#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fxquant {
namespace {

bool extent(const float* x, int64_t k, float* low, float* high) {
  *low = 0.f, *high = 0.f;
  bool finite = true;
  for (int64_t i = 0; i < k; i++) {
    finite &= std::isfinite(x[i]);
    *low = std::min(*low, x[i]);
    *high = std::max(*high, x[i]);
  }
  return finite;
}

uint8_t code(float x, float step, int32_t zero_point, int32_t qmax) {
  const float quotient = std::clamp(x / step, -kFarthest, kFarthest);
  return static_cast<uint8_t>(std::clamp(static_cast<int32_t>(std::lrintf(quotient)) + zero_point, 0, qmax));
}

void encode(const float* x, int64_t k, int32_t qmax, float scale, int32_t zero_point, uint8_t* codes) {
  std::memset(codes + k, 0, padded_features(k) - k);
  for (int64_t i = 0; i < k; i++) codes[i] = code(x[i], scale, zero_point, qmax);
}

bool encode_channels(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes) {
  std::memset(codes + k, 0, padded_features(k) - k);
  for (int64_t i = 0; i < k; i++) {
    if (!std::isfinite(x[i])) return false;
    codes[i] = code(x[i], steps[i], zero_point, qmax);
  }
  return true;
}

void panel(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
           int32_t* sums) {
  const int8_t* weights = reinterpret_cast<const int8_t*>(packed + layout.weights + p * layout.steps * 64);
  std::memset(sums, 0, rows * kPanel * sizeof(int32_t));
  for (int64_t s = 0; s < layout.steps; s++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < kPanel; c++)
        for (int64_t j = 0; j < kStep; j++)
          sums[r * kPanel + c] += codes[r * stride + s * kStep + j] * weights[s * 64 + c * kStep + j];
}

void finish(const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
            const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const uint32_t sum = static_cast<uint32_t>(sums[r * kPanel + c]) -
                           static_cast<uint32_t>(zero_points[r]) * static_cast<uint32_t>(column_sums[c]);
      const float y = static_cast<float>(static_cast<int32_t>(sum)) * (scale_x[r] * scale_w[c]);
      out[r * ldo + c] = bias ? y + bias[c] : y;
    }
}

}  // namespace

const Kernels kScalar = {extent, encode, encode_channels, panel, panel, nullptr, finish, kMaxRows, kMaxRows, false};

}  // namespace fxquant
