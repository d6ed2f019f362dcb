// The portable kernels: what every other path must equal, bit for bit.
#include "layout.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fxquant {
namespace {

void quantize(const float* x, int64_t k, int32_t qmax, uint8_t* codes, float* scale, int32_t* zero_point) {
  float low = 0.f, high = 0.f;
  bool finite = true;
  for (int64_t i = 0; i < k; i++) {
    finite &= std::isfinite(x[i]);
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  const int64_t padded = (k + kStep - 1) / kStep * kStep;
  std::memset(codes, 0, padded);
  if (!finite) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    *zero_point = 0;
    return;
  }
  const float top = static_cast<float>(qmax);
  const float s = std::max(high / top - low / top, std::numeric_limits<float>::min());
  const int32_t zero = std::clamp(static_cast<int32_t>(std::lrintf(-low / s)), 0, qmax);
  for (int64_t i = 0; i < k; i++)
    codes[i] = static_cast<uint8_t>(std::clamp(static_cast<int32_t>(std::lrintf(x[i] / s)) + zero, 0, qmax));
  *scale = s;
  *zero_point = zero;
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
            const int32_t* zero_points, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const uint32_t sum = static_cast<uint32_t>(sums[r * kPanel + c]) -
                           static_cast<uint32_t>(zero_points[r]) * static_cast<uint32_t>(column_sums[c]);
      out[r * ldo + c] = static_cast<float>(static_cast<int32_t>(sum)) * (scale_x[r] * scale_w[c]);
    }
}

}  // namespace

const Kernels kScalar = {quantize, panel, panel, nullptr, finish, kMaxRows, kMaxRows, false};

}  // namespace fxquant
