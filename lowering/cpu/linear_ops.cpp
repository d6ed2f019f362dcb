// The linear operators on torch's stable ABI. Schemas are defined in Python (fxquant/ops/linear.py).
#include "isa.h"
#include "layout.h"
#include "linear.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

using namespace fxquant;

namespace {

void check_scheme(int64_t weight_bits, int64_t act_bits) {
  STD_TORCH_CHECK(is_width(weight_bits) && is_width(act_bits), "fxquant: no kernel for w", weight_bits, "a", act_bits,
                  "; use ", kMinBits, " to ", kMaxBits, " bits each");
}

// The input as [m, k] with the packed weight checked against it.
struct Problem {
  Tensor x;
  int64_t m, n, k;
  int32_t weight_bits, act_bits;
  const uint8_t* packed;

  Problem(const Tensor& input, const Tensor& weight, int64_t out_features, int64_t w_bits, int64_t a_bits)
      : x(as_contiguous(input)), n(out_features), k(0), weight_bits(w_bits), act_bits(a_bits) {
    check_scheme(w_bits, a_bits);
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "fxquant: the input must be float32");
    STD_TORCH_CHECK(input.dim() >= 1, "fxquant: the input must have at least one dimension");
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte && weight.is_contiguous() && weight.dim() == 1,
                    "fxquant: the packed weight must be a contiguous vector of uint8");
    k = input.size(input.dim() - 1);
    packed = data<uint8_t>(weight);
    Header header{};
    STD_TORCH_CHECK(weight.numel() >= 64, "fxquant: the packed weight is truncated");
    std::memcpy(&header, packed, sizeof header);
    STD_TORCH_CHECK(header.magic == kMagic && header.version == kVersion,
                    "fxquant: this is no packed weight of this version");
    STD_TORCH_CHECK(header.n == n && header.k == k && header.weight_bits == weight_bits && header.act_bits == act_bits,
                    "fxquant: the weight was packed as w", header.weight_bits, "a", header.act_bits, " ",
                    header.n, " x ", header.k, ", the call asks for w", weight_bits, "a", act_bits, " ", n, " x ", k);
    STD_TORCH_CHECK(weight.numel() == Layout(header).bytes, "fxquant: the packed weight is truncated");
    m = k == 0 ? 0 : x.numel() / k;
  }

  std::vector<int64_t> out_sizes() const { return sizes_with_last(x, n); }

  // Quantizes the rows, by given steps [k] or (null) by the qparams of each, into scratch memory, which it returns; then
  // use(scratch, tile) for every tile. All of it in one parallel region.
  template <typename Use>
  std::unique_ptr<uint8_t[]> run(const float* steps, const int32_t* zero_point, Use use) const {
    std::unique_ptr<uint8_t[]> memory(new uint8_t[fxquant_linear_scratch_bytes(m, k, weight_bits, act_bits)]);
    uint8_t* scratch = memory.get();
    FxquantTeam team;
    fxquant_team_start(&team, m, n, k, weight_bits, act_bits, torch::stable::get_num_threads());
    torch::stable::parallel_for(0, team.threads, 1, [&](int64_t seat, int64_t) {
      fxquant_team_quantize(&team, seat, data<float>(x), k, steps, zero_point, scratch);
      for (FxquantTile tile; fxquant_team_tile(&team, seat, &tile);) use(scratch, tile);
    });
    return memory;
  }
};

// The whole linear with given steps [k], or (null) with the qparams of each row.
Tensor linear(const Problem& problem, const std::optional<Tensor>& bias, const float* steps, const int32_t* zero_point) {
  const std::optional<Tensor> added = checked_bias(bias, problem.n, "fxquant");
  const float* b = added ? data<float>(*added) : nullptr;
  Tensor out = torch::stable::new_empty(problem.x, problem.out_sizes());
  if (problem.m == 0) return out;
  float* y = data<float>(out);
  const int64_t n = problem.n;
  problem.run(steps, zero_point, [&](const uint8_t* scratch, const FxquantTile& t) {
    fxquant_linear_bias_tile(scratch, problem.m, problem.packed, b, t.m0, t.m1, t.n0, t.n1, y + t.m0 * n + t.n0, n);
  });
  return out;
}

Tensor linear_dynamic(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, int64_t out_features,
                      int64_t weight_bits, int64_t act_bits) {
  return linear(Problem(x, packed, out_features, weight_bits, act_bits), bias, nullptr, nullptr);
}

Tensor linear_static(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, const Tensor& scale,
                     const Tensor& zero_point, int64_t out_features, int64_t weight_bits, int64_t act_bits) {
  const Problem problem(x, packed, out_features, weight_bits, act_bits);
  const int64_t count = scale.numel(), features = problem.k;
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float && (count == 1 || count == features),
                  "fxquant::linear_static: the scale must be float32 of 1 or ", features, " values");
  STD_TORCH_CHECK(zero_point.scalar_type() == ScalarType::Int && zero_point.numel() == 1,
                  "fxquant::linear_static: the zero point must be one int32 value");
  const Tensor given = as_contiguous(scale);
  const int32_t zero = *data<int32_t>(zero_point), qmax = (1 << act_bits) - 1;
  for (int64_t i = 0; i < count; i++) {
    const float s = data<float>(given)[i];
    STD_TORCH_CHECK(std::isfinite(s) && s >= std::numeric_limits<float>::min(),
                    "fxquant::linear_static: the scale ", s, " is no positive normal number");
  }
  STD_TORCH_CHECK(zero >= 0 && zero <= qmax,
                  "fxquant::linear_static: the zero point ", zero, " lies outside 0 .. ", qmax);
  if (count == features) return linear(problem, bias, data<float>(given), &zero);
  const std::vector<float> steps(features, *data<float>(given));
  return linear(problem, bias, steps.data(), &zero);
}

// Sets an instruction set (-1: leaves the one in force) and puts the former one back, also where a check fails.
struct Isa {
  const int32_t before = fxquant_isa();

  explicit Isa(int64_t isa) {
    if (isa < 0 || fxquant_set_isa(static_cast<int32_t>(isa)) == isa) return;
    fxquant_set_isa(before);
    STD_TORCH_CHECK(false, "fxquant: this CPU does not run instruction set ", isa);
  }
  ~Isa() { fxquant_set_isa(before); }
  Isa(const Isa&) = delete;
};

// Codes, scales, zero points and int32 sums as some instruction set computes them; for tests.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_dynamic_int32(
    const Tensor& x, const Tensor& packed, int64_t out_features, int64_t weight_bits, int64_t act_bits, int64_t isa) {
  const Isa forced(isa);
  const Problem problem(x, packed, out_features, weight_bits, act_bits);
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  Tensor codes = torch::stable::new_empty(x, {m, k}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, {m});
  Tensor zero = torch::stable::new_empty(x, {m}, ScalarType::Int);
  Tensor sums = torch::stable::new_empty(x, {m, n}, ScalarType::Int);
  const auto scratch = problem.run(nullptr, nullptr, [&](const uint8_t* codes, const FxquantTile& t) {
    fxquant_linear_tile_int32(
        codes, m, problem.packed, t.m0, t.m1, t.n0, t.n1, data<int32_t>(sums) + t.m0 * n + t.n0, n);
  });
  const bool wide = is_wide(problem.weight_bits, problem.act_bits);
  const Scratch layout(m, k, wide);
  std::memcpy(data<float>(scale), scratch.get(), m * 4);
  std::memcpy(data<int32_t>(zero), scratch.get() + layout.zero_points, m * 4);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < k; j++)
      data<uint8_t>(codes)[i * k + j] = scratch[layout.codes + i * layout.stride + j * (wide ? 2 : 1)];
  return {codes, scale, zero, sums};
}

Tensor pack_linear(const Tensor& codes, const Tensor& scales, int64_t weight_bits, int64_t act_bits) {
  check_scheme(weight_bits, act_bits);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2, "fxquant::pack_linear: codes must be int8 [n, k]");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == codes.size(0),
                  "fxquant::pack_linear: scales must be float32, one a row of codes");
  STD_TORCH_CHECK(codes.size(0) > 0 && codes.size(1) > 0 && codes.size(1) <= kMaxFeatures,
                  "fxquant::pack_linear: codes must have at least one row and 1 to ", kMaxFeatures, " columns");
  const Tensor rows = as_contiguous(codes), factors = as_contiguous(scales);
  const int64_t n = codes.size(0), k = codes.size(1);
  Tensor out = torch::stable::new_empty(codes, {fxquant_linear_packed_bytes(n, k, weight_bits, act_bits)}, ScalarType::Byte);
  const int32_t status = fxquant_linear_pack(data<int8_t>(rows), data<float>(factors), n, k, weight_bits, act_bits, data<uint8_t>(out));
  STD_TORCH_CHECK(status != 1, "fxquant::pack_linear: a code lies outside the range of ", weight_bits, " bits");
  STD_TORCH_CHECK(status == 0, "fxquant::pack_linear: no safe accumulation schedule exists");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_static", TORCH_BOX(&linear_static));
  m.impl("linear_dynamic_int32", TORCH_BOX(&linear_dynamic_int32));
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
}
