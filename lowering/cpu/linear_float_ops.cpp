// The float linear on torch's stable ABI. Schemas are defined in Python (fxquant/ops/linear_float.py).
#include "linear_float.h"
#include "linear_float_layout.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

using namespace fxquant;

namespace {

constexpr int64_t kSerial = 65536;  // multiply-accumulates that cost less than waking the other threads

void check(const Tensor& x, const Tensor& packed, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "fxquant::linear_float: the input must be float32");
  STD_TORCH_CHECK(x.dim() >= 1, "fxquant::linear_float: the input must have at least one dimension");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.dim() == 1,
                  "fxquant::linear_float: the packed weight must be a contiguous vector of uint8");
  STD_TORCH_CHECK(packed.numel() >= 64, "fxquant::linear_float: the packed weight is truncated");
  Header header{};
  std::memcpy(&header, data<uint8_t>(packed), sizeof header);
  STD_TORCH_CHECK(header.magic == kFloatMagic && header.version == kVersion,
                  "fxquant::linear_float: this is no packed weight of this version");
  const int64_t k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(header.n == n && header.k == k, "fxquant::linear_float: the weight was packed as ", header.n, " x ", header.k,
                  ", the call asks for ", n, " x ", k);
  STD_TORCH_CHECK(packed.numel() == float_packed_bytes(n, k), "fxquant::linear_float: the packed weight is truncated");
}

Tensor linear_float(const Tensor& input, const Tensor& packed, std::optional<Tensor> bias, int64_t out_features) {
  check(input, packed, out_features);
  const Tensor x = as_contiguous(input);
  const std::optional<Tensor> added = checked_bias(bias, out_features, "fxquant::linear_float");
  const int64_t k = x.size(x.dim() - 1), m = x.numel() / k, n = out_features;
  Tensor out = torch::stable::new_empty(x, sizes_with_last(x, n));
  if (m == 0) return out;
  const float* b = added ? data<float>(*added) : nullptr;
  int64_t rows = 0, columns = 0;
  fxquant_float_tiles(m, n, torch::stable::get_num_threads(), &rows, &columns);
  const int64_t across = (n + columns - 1) / columns, down = (m + rows - 1) / rows;
  const int64_t tiles = across * down, grain = m * n * k <= kSerial ? tiles : 1;
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const int64_t m0 = t / across * rows, n0 = t % across * columns;
      fxquant_float_tile(data<float>(x), k, data<uint8_t>(packed), b, m0, std::min(m0 + rows, m), n0,
                         std::min(n0 + columns, n), data<float>(out) + m0 * n + n0, n);
    }
  });
  return out;
}

Tensor pack_float(const Tensor& weight) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 2, "fxquant::pack_float: the weight must be float32 [n, k]");
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "fxquant::pack_float: the weight must not be empty");
  const Tensor rows = as_contiguous(weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  Tensor out = torch::stable::new_empty(weight, {fxquant_float_packed_bytes(n, k)}, ScalarType::Byte);
  fxquant_float_pack(data<float>(rows), n, k, data<uint8_t>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("linear_float", TORCH_BOX(&linear_float));
  m.impl("pack_float", TORCH_BOX(&pack_float));
}
