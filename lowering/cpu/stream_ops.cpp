// The operators of streamed linears on torch's stable ABI. Schemas are defined in Python (fxquant/ops/stream.py).
#include "stream.h"

#include "stream_layout.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

using namespace fxquant;
using namespace fxquant::stream;

namespace {

// A thread that reads less than this from memory costs more to wake than it saves.
constexpr int64_t kBytesPerThread = 32768;

void check_format(int64_t weight_bits, int64_t act_bits, int64_t group) {
  const bool is_float = act_bits == 16 && (weight_bits == 2 || weight_bits == 4 || weight_bits == 8);
  STD_TORCH_CHECK(is_float || (act_bits == 8 && weight_bits == 4), "fxquant: no decode kernel for w", weight_bits, "a", act_bits,
                  "; use w2a16, w4a16, w8a16 or w4a8");
  STD_TORCH_CHECK(group >= 0 && group <= 256 && group % 16 == 0, "fxquant: no decode kernel for groups of ", group,
                  " input features; use a multiple of 16 up to 256, or 0 for one group");
}

StreamHeader header_of(const Tensor& packed) {
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.dim() == 1,
                  "fxquant: a streamed weight must be a contiguous vector of uint8");
  StreamHeader header{};
  STD_TORCH_CHECK(packed.numel() >= 64, "fxquant: the streamed weight is truncated");
  std::memcpy(&header, packed.data_ptr(), sizeof header);
  STD_TORCH_CHECK(header.magic == kStreamMagic && header.version == kStreamVersion,
                  "fxquant: this is no streamed weight of this version");
  STD_TORCH_CHECK(packed.numel() == StreamLayout(header).bytes, "fxquant: the streamed weight is truncated");
  return header;
}

// The input as [m, k] with the streamed weight checked against it.
struct Problem {
  Tensor x;
  int64_t m, n, k;
  const uint8_t* packed;

  Problem(const Tensor& input, const Tensor& weight, int64_t out_features, int64_t weight_bits, int64_t act_bits, int64_t group)
      : x(as_contiguous(input)), n(out_features), packed(data<uint8_t>(weight)) {
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "fxquant::linear_stream: the input must be float32");
    STD_TORCH_CHECK(input.dim() >= 1, "fxquant::linear_stream: the input must have at least one dimension");
    const StreamHeader h = header_of(weight);
    k = input.size(input.dim() - 1);
    STD_TORCH_CHECK(h.n == n && h.k == k && h.weight_bits == weight_bits && h.act_bits == act_bits && h.group == group,
                    "fxquant::linear_stream: the weight was packed as w", h.weight_bits, "a", h.act_bits, "-g", h.group, " ",
                    h.n, " x ", h.k, ", the call asks for w", weight_bits, "a", act_bits, "-g", group, " ", n, " x ", k);
    m = x.numel() / k;
  }

  std::vector<int64_t> out_sizes() const { return sizes_with_last(x, n); }

  std::unique_ptr<uint8_t[]> prepare() const {
    std::unique_ptr<uint8_t[]> scratch(new uint8_t[fxquant_stream_scratch_bytes(packed, m)]);
    const int64_t grain = std::max<int64_t>(1, 8192 / k);
    torch::stable::parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
      fxquant_stream_prepare(data<float>(x), k, begin, end, m, packed, scratch.get());
    });
    return scratch;
  }
};

Tensor linear_stream(const Tensor& x, const Tensor& packed, std::optional<Tensor> bias, int64_t out_features,
                     int64_t weight_bits, int64_t act_bits, int64_t group) {
  const Problem problem(x, packed, out_features, weight_bits, act_bits, group);
  const std::optional<Tensor> added = checked_bias(bias, out_features, "fxquant::linear_stream");
  const float* b = added ? data<float>(*added) : nullptr;
  Tensor out = torch::stable::new_empty(problem.x, problem.out_sizes());
  if (problem.m == 0) return out;
  const auto scratch = problem.prepare();
  const StreamLayout layout(*reinterpret_cast<const StreamHeader*>(problem.packed));
  const int64_t m = problem.m, n = problem.n, k = problem.k;
  const int64_t block = even_share(m, kRowBlock), blocks = (m + block - 1) / block;
  const int64_t work = layout.panel_bytes * std::max<int64_t>(1, m / 4);
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / work);
  // Blocks of rows outermost: a thread's share is whole ranges of columns, one linear stream each.
  torch::stable::parallel_for(0, blocks * layout.panels, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t i = begin / layout.panels, first = begin % layout.panels;
      const int64_t last = std::min(layout.panels, first + end - begin);
      const int64_t m0 = i * block, n0 = first * kPanel;
      fxquant_stream_run(data<float>(problem.x), k, scratch.get(), m, problem.packed, b, m0, std::min(m, m0 + block), n0,
                         std::min(n, last * kPanel), data<float>(out) + m0 * n + n0, n);
      begin += last - first;
    }
  });
  return out;
}

Tensor pack_stream(const Tensor& codes, const Tensor& scales, int64_t weight_bits, int64_t act_bits, int64_t group) {
  check_format(weight_bits, act_bits, group);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2 && codes.numel() > 0,
                  "fxquant::pack_stream: codes must be int8 [n, k], not empty");
  const int64_t n = codes.size(0), k = codes.size(1), groups = group == 0 ? 1 : (k + group - 1) / group;
  STD_TORCH_CHECK(k <= kMaxFeatures, "fxquant::pack_stream: codes must have at most ", kMaxFeatures, " columns");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 2 && scales.size(0) == n && scales.size(1) == groups,
                  "fxquant::pack_stream: scales must be float32 [", n, ", ", groups, "]");
  const Tensor rows = as_contiguous(codes), factors = as_contiguous(scales);
  const auto bits = static_cast<int32_t>(weight_bits), acts = static_cast<int32_t>(act_bits), size = static_cast<int32_t>(group);
  Tensor out = torch::stable::new_empty(codes, {fxquant_stream_packed_bytes(n, k, bits, acts, size)}, ScalarType::Byte);
  const int32_t status =
      fxquant_stream_pack(data<int8_t>(rows), data<float>(factors), n, k, bits, acts, size, data<uint8_t>(out));
  STD_TORCH_CHECK(status == 0, "fxquant::pack_stream: a code lies outside the range of ", weight_bits, " bits");
  return out;
}

Tensor pack_stream_table(const Tensor& codes, const Tensor& values, const Tensor& scales, int64_t group) {
  check_format(4, 16, group);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char && codes.dim() == 2 && codes.numel() > 0,
                  "fxquant::pack_stream_table: codes must be int8 [n, k], not empty");
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 1 && values.size(0) == 16,
                  "fxquant::pack_stream_table: values must be float32 [16]");
  const int64_t n = codes.size(0), k = codes.size(1), groups = group == 0 ? 1 : (k + group - 1) / group;
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.dim() == 2 && scales.size(0) == n && scales.size(1) == groups,
                  "fxquant::pack_stream_table: scales must be float32 [", n, ", ", groups, "]");
  const Tensor rows = as_contiguous(codes), table = as_contiguous(values), factors = as_contiguous(scales);
  const auto size = static_cast<int32_t>(group);
  Tensor out = torch::stable::new_empty(codes, {fxquant_stream_table_bytes(n, k, size)}, ScalarType::Byte);
  const int32_t status =
      fxquant_stream_pack_table(data<int8_t>(rows), data<float>(table), data<float>(factors), n, k, size, data<uint8_t>(out));
  STD_TORCH_CHECK(status == 0, "fxquant::pack_stream_table: a code lies outside of 0 .. 15");
  return out;
}

std::tuple<Tensor, Tensor> unpack_stream(const Tensor& packed) {
  const StreamHeader header = header_of(packed);
  const StreamLayout layout(header);
  Tensor codes = torch::stable::new_empty(packed, {layout.n, layout.k}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(packed, {layout.n, layout.groups}, ScalarType::Float);
  fxquant_stream_unpack(data<uint8_t>(packed), data<int8_t>(codes), data<float>(scales));
  return {codes, scales};
}

// Sums of every group as the instruction set in force computes them; for tests.
Tensor stream_sums(const Tensor& x, const Tensor& packed) {
  const StreamHeader header = header_of(packed);
  STD_TORCH_CHECK(header.act_bits == 8, "fxquant::stream_sums: this weight meets float activations");
  const Problem problem(x, packed, header.n, header.weight_bits, header.act_bits, header.group);
  const auto scratch = problem.prepare();
  Tensor sums = torch::stable::new_empty(x, {problem.m, StreamLayout(header).groups, header.n}, ScalarType::Int);
  fxquant_stream_sums(scratch.get(), problem.m, problem.packed, data<int32_t>(sums));
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("linear_stream", TORCH_BOX(&linear_stream));
  m.impl("pack_stream", TORCH_BOX(&pack_stream));
  m.impl("pack_stream_table", TORCH_BOX(&pack_stream_table));
  m.impl("unpack_stream", TORCH_BOX(&unpack_stream));
  m.impl("stream_sums", TORCH_BOX(&stream_sums));
}
