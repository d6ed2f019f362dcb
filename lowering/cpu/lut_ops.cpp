// The look-up linear on torch's stable ABI. Schemas are defined in Python (fxquant/ops/linear_lut.py).
#include "isa.h"
#include "linear.h"
#include "lut.h"
#include "lut_layout.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

using namespace fxquant;

namespace {

void check_bits(int64_t act_bits) {
  STD_TORCH_CHECK(act_bits >= 2 && act_bits <= kLutMaxActBits, "fxquant: look-ups take activations of 2 to ", kLutMaxActBits,
                  " bits, not ", act_bits);
}

// The input as [m, k] with the packed weight checked against it.
struct Problem {
  Tensor x;
  int64_t m, n, k;
  int32_t act_bits;
  const uint8_t* packed;

  Problem(const Tensor& input, const Tensor& weight, int64_t out_features, int64_t bits)
      : x(as_contiguous(input)), n(out_features), k(0), act_bits(static_cast<int32_t>(bits)) {
    check_bits(bits);
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "fxquant::linear_lut: the input must be float32");
    STD_TORCH_CHECK(input.dim() >= 1, "fxquant::linear_lut: the input must have at least one dimension");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && weight.dim() == 1,
                    "fxquant::linear_lut: the packed weight must be a contiguous vector of uint8");
    k = input.size(input.dim() - 1);
    packed = data<uint8_t>(weight);
    Header header{};
    STD_TORCH_CHECK(weight.numel() >= 64, "fxquant::linear_lut: the packed weight is truncated");
    std::memcpy(&header, packed, sizeof header);
    STD_TORCH_CHECK(header.magic == kLutMagic && header.version == kVersion,
                    "fxquant::linear_lut: this is no packed weight of this version");
    STD_TORCH_CHECK(header.n == n && header.k == k && header.act_bits == act_bits, "fxquant::linear_lut: the weight was packed as w2a",
                    header.act_bits, " ", header.n, " x ", header.k, ", the call asks for w2a", act_bits, " ", n, " x ", k);
    STD_TORCH_CHECK(weight.numel() == LutLayout(n, k).bytes, "fxquant::linear_lut: the packed weight is truncated");
    m = k == 0 ? 0 : x.numel() / k;
  }

  std::vector<int64_t> out_sizes() const { return sizes_with_last(x, n); }

  std::unique_ptr<uint8_t[]> quantize() const {
    std::unique_ptr<uint8_t[]> scratch(new uint8_t[fxquant_linear_scratch_bytes(m, k, 2, act_bits)]);
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(k, 1));
    torch::stable::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
      fxquant_quantize_rows(data<float>(x), k, begin, end, k, 2, act_bits, scratch.get(), m);
    });
    return scratch;
  }

  // use(m0, m1, n0, n1, tables) for every tile, in parallel; the tables belong to the thread.
  template <typename Use>
  void tiles(Use use) const {
    int64_t rows = 0, columns = 0;
    fxquant_lut_tiles(m, n, torch::stable::get_num_threads(), &rows, &columns);
    const int64_t across = (n + columns - 1) / columns, down = (m + rows - 1) / rows;
    torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<uint8_t[]> tables(new uint8_t[fxquant_lut_table_bytes(k)]);
      for (int64_t t = begin; t < end; t++) {
        const int64_t m0 = t / across * rows, n0 = t % across * columns;
        use(m0, std::min(m0 + rows, m), n0, std::min(n0 + columns, n), tables.get());
      }
    });
  }
};

Tensor linear_lut(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, int64_t out_features, int64_t act_bits) {
  const Problem problem(x, packed, out_features, act_bits);
  const std::optional<Tensor> added = checked_bias(bias, out_features, "fxquant::linear_lut");
  const float* b = added ? data<float>(*added) : nullptr;
  Tensor out = torch::stable::new_empty(problem.x, problem.out_sizes());
  if (problem.m == 0) return out;
  const auto scratch = problem.quantize();
  float* y = data<float>(out);
  const int64_t n = problem.n;
  problem.tiles([&](int64_t m0, int64_t m1, int64_t n0, int64_t n1, uint8_t* tables) {
    fxquant_lut_tile(scratch.get(), problem.m, problem.packed, m0, m1, n0, n1, tables, y + m0 * n + n0, n);
    if (b == nullptr) return;
    for (int64_t i = m0; i < m1; i++)
      for (int64_t j = n0; j < n1; j++) y[i * n + j] = y[i * n + j] + b[j];
  });
  return out;
}

// The int32 sums, for tests.
Tensor linear_lut_int32(const Tensor& x, const Tensor& packed, int64_t out_features, int64_t act_bits) {
  const Problem problem(x, packed, out_features, act_bits);
  const int64_t n = problem.n;
  Tensor sums = torch::stable::new_empty(x, problem.out_sizes(), ScalarType::Int);
  if (problem.m == 0) return sums;
  const auto scratch = problem.quantize();
  problem.tiles([&](int64_t m0, int64_t m1, int64_t n0, int64_t n1, uint8_t* tables) {
    fxquant_lut_tile_int32(scratch.get(), problem.m, problem.packed, m0, m1, n0, n1, tables, data<int32_t>(sums) + m0 * n + n0, n);
  });
  return sums;
}

Tensor pack_lut(const Tensor& codes, const Tensor& scales, int64_t act_bits) {
  check_bits(act_bits);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2, "fxquant::pack_lut: codes must be int8 [n, k]");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == codes.size(0),
                  "fxquant::pack_lut: scales must be float32, one a row of codes");
  STD_TORCH_CHECK(codes.size(0) > 0 && codes.size(1) > 0 && codes.size(1) <= kMaxFeatures,
                  "fxquant::pack_lut: codes must have at least one row and 1 to ", kMaxFeatures, " columns");
  const Tensor rows = as_contiguous(codes), factors = as_contiguous(scales);
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor out = torch::stable::new_empty(codes, {fxquant_lut_packed_bytes(n, k)}, ScalarType::Byte);
  const int32_t status = fxquant_lut_pack(data<int8_t>(rows), data<float>(factors), n, k, static_cast<int32_t>(act_bits), data<uint8_t>(out));
  STD_TORCH_CHECK(status == 0, "fxquant::pack_lut: a code is none of -1, 0 and 1");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("linear_lut", TORCH_BOX(&linear_lut));
  m.impl("linear_lut_int32", TORCH_BOX(&linear_lut_int32));
  m.impl("pack_lut", TORCH_BOX(&pack_lut));
}
