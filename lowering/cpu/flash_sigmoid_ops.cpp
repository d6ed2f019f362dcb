// The sigmoid attention operators on torch's stable ABI. Schemas are defined in Python (fxquant/ops/sigmoid_attention.py).
#include "flash_sigmoid.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

using namespace fxquant;

namespace {

// q, k, v and mask as heads of up to two leading dimensions.
struct Problem {
  Tensor q, k, v;
  std::optional<Tensor> mask, slopes;
  int64_t outer = 1, inner = 1, bytes;
  FxquantSigmoidHead shared{};

  Problem(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, std::optional<Tensor> mask_in,
          std::optional<Tensor> slopes_in, double scale, double bias, bool causal)
      : q(with_dense_rows(q_in)), k(k_in), v(with_dense_rows(v_in)), mask(mask_in) {
    const int64_t dims = q.dim();
    const ScalarType type = q.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                    "fxquant::sigmoid_attention: q must be float32 or float64");
    STD_TORCH_CHECK(k.scalar_type() == type && v.scalar_type() == type,
                    "fxquant::sigmoid_attention: q, k and v must share a dtype");
    STD_TORCH_CHECK(dims >= 2 && dims <= 4 && k.dim() == dims && v.dim() == dims,
                    "fxquant::sigmoid_attention: q, k and v must have the same 2 to 4 dimensions");
    for (int64_t i = 0; i + 2 < dims; i++)
      STD_TORCH_CHECK(k.size(i) == q.size(i) && v.size(i) == q.size(i),
                      "fxquant::sigmoid_attention: q, k and v must share their leading sizes");
    STD_TORCH_CHECK(k.size(dims - 1) == q.size(dims - 1) && k.size(dims - 2) == v.size(dims - 2),
                    "fxquant::sigmoid_attention: k must have the features of q and the rows of v");
    if (dims > 3) outer = q.size(0);
    if (dims > 2) inner = q.size(dims - 3);
    bytes = type == ScalarType::Double ? 8 : 4;
    shared.n = q.size(dims - 2), shared.m = k.size(dims - 2), shared.d = q.size(dims - 1), shared.e = v.size(dims - 1);
    shared.q_row = q.stride(dims - 2), shared.v_row = v.stride(dims - 2);
    shared.k_row = k.stride(dims - 2), shared.k_column = k.stride(dims - 1);
    shared.scale = scale, shared.bias = bias, shared.causal = causal, shared.is_double = bytes == 8;
    if (mask) check_mask(dims);
    if (slopes_in) {
      STD_TORCH_CHECK(slopes_in->scalar_type() == type && slopes_in->dim() == 1 && slopes_in->size(0) == inner,
                      "fxquant::sigmoid_attention: slopes must be one number a head, of the dtype of q");
      slopes = torch::stable::contiguous(*slopes_in);
    }
  }

  void check_mask(int64_t dims) {
    const bool is_bool = mask->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(is_bool || mask->scalar_type() == q.scalar_type(),
                    "fxquant::sigmoid_attention: the mask must be bool or of the dtype of q");
    STD_TORCH_CHECK(mask->dim() >= 2 && mask->dim() <= dims,
                    "fxquant::sigmoid_attention: the mask must have 2 dimensions up to those of q");
    for (int64_t i = 0; i < mask->dim(); i++) {
      const int64_t from_end = mask->dim() - i;
      const int64_t wanted = from_end == 1 ? shared.m : from_end == 2 ? shared.n : q.size(dims - from_end);
      STD_TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == wanted,
                      "fxquant::sigmoid_attention: the mask does not broadcast to [..., N, M]");
    }
    shared.mask_kind = is_bool ? 2 : 1;
    shared.mask_row = mask_stride(2), shared.mask_column = mask_stride(1);
  }

  int64_t mask_stride(int64_t from_end) const {
    if (from_end > mask->dim()) return 0;
    const int64_t i = mask->dim() - from_end;
    return mask->size(i) == 1 ? 0 : mask->stride(i);
  }

  static int64_t stride(const Tensor& x, int64_t from_end) { return from_end > x.dim() ? 0 : x.stride(x.dim() - from_end); }

  const void* place(const Tensor& x, int64_t a, int64_t b) const {
    return static_cast<const uint8_t*>(x.data_ptr()) + (a * stride(x, 4) + b * stride(x, 3)) * bytes;
  }

  FxquantSigmoidHead head(int64_t index) const {
    const int64_t a = index / inner, b = index % inner;
    FxquantSigmoidHead made = shared;
    made.q = place(q, a, b), made.k = place(k, a, b), made.v = place(v, a, b);
    if (mask)
      made.mask = static_cast<const uint8_t*>(mask->data_ptr()) +
                  (a * mask_stride(4) + b * mask_stride(3)) * (made.mask_kind == 2 ? 1 : bytes);
    if (slopes)
      made.slope = made.is_double ? static_cast<const double*>(slopes->data_ptr())[b]
                                  : static_cast<const float*>(slopes->data_ptr())[b];
    return made;
  }

  int64_t heads() const { return outer * inner; }

  std::vector<int64_t> out_sizes() const { return sizes_with_last(q, shared.e); }
};

Tensor sigmoid_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                         std::optional<Tensor> slopes, double scale, double bias, bool causal) {
  const Problem problem(q, k, v, mask, slopes, scale, bias, causal);
  Tensor out = torch::stable::new_empty(problem.q, problem.out_sizes());
  const FxquantSigmoidHead& shared = problem.shared;
  if (out.numel() == 0) return out;
  // Rows of one turn: whole heads, which transposes each block of keys once, unless that leaves threads idle.
  const int64_t threads = torch::stable::get_num_threads(), heads = problem.heads();
  constexpr int64_t kMost = 1024, kLeast = 96;
  const int64_t share = heads >= threads ? kMost : std::max(kLeast, (shared.n * heads + threads - 1) / threads);
  const int64_t rows = std::min({shared.n, share, kMost}), turns = (shared.n + rows - 1) / rows;
  uint8_t* to = static_cast<uint8_t*>(out.data_ptr());
  torch::stable::parallel_for(0, heads * turns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const FxquantSigmoidHead head = problem.head(t / turns);
      const int64_t first = t % turns * rows;
      fxquant_sigmoid_attention(&head, first, std::min(first + rows, head.n),
                                to + t / turns * head.n * head.e * problem.bytes);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sigmoid_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
    std::optional<Tensor> slopes, double scale, double bias, bool causal) {
  const Problem problem(q, k, v, mask, slopes, scale, bias, causal);
  const Tensor dense = torch::stable::contiguous(grad);
  STD_TORCH_CHECK(dense.scalar_type() == q.scalar_type() && dense.numel() == problem.heads() * problem.shared.n * problem.shared.e,
                  "fxquant::sigmoid_attention_backward: the gradient must be like the output");
  const auto zeros = [&](const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); i++) sizes.push_back(x.size(i));
    return torch::stable::new_zeros(x, sizes);
  };
  Tensor gq = zeros(q), gk = zeros(k), gv = zeros(v);
  const auto at = [&](const Tensor& x, int64_t offset) { return static_cast<uint8_t*>(x.data_ptr()) + offset * problem.bytes; };
  if (problem.shared.n == 0 || problem.shared.m == 0) return {gq, gk, gv};
  torch::stable::parallel_for(0, problem.heads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      const FxquantSigmoidHead head = problem.head(h);
      fxquant_sigmoid_attention_gradients(&head, at(dense, h * head.n * head.e), at(gq, h * head.n * head.d),
                                          at(gk, h * head.m * head.d), at(gv, h * head.m * head.e));
    }
  });
  return {gq, gk, gv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("sigmoid_attention", TORCH_BOX(&sigmoid_attention));
  m.impl("sigmoid_attention_backward", TORCH_BOX(&sigmoid_attention_backward));
}
