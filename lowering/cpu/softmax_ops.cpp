// The softmax operators on torch's stable ABI. Schemas are defined in Python (fxquant/ops/softmax.py).
#include "isa.h"
#include "softmax.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kPart = FXQUANT_SOFTMAX_PART;

// A row in parts over all threads. The parts, and the order in which their sums merge, do not depend on the threads.
void long_row(const float* x, float* y, int64_t n, bool log, int32_t form, std::vector<FxquantSoftmaxSum>& sums) {
  const int64_t parts = (n + kPart - 1) / kPart;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    fxquant_softmax_sums(x, n, first, last, form, sums.data());
  });
  FxquantSoftmaxSum total;
  const int32_t chosen = fxquant_softmax_merge(x, n, form, sums.data(), &total);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    fxquant_softmax_write(x, y, n, first, last, log, chosen, &total);
  });
}

void run(const float* x, float* y, int64_t rows, int64_t n, bool log, int32_t form) {
  if (log && form == FXQUANT_SOFTMAX_TWO_PASS) form = FXQUANT_SOFTMAX_BLOCKED;
  constexpr int64_t kGrain = 16384;  // elements that are worth a thread
  // A row is split only where whole rows would leave threads idle: each split row costs two barriers.
  const int64_t threads = torch::stable::get_num_threads();
  const bool is_uneven = rows < 4 * threads && rows % threads != 0;
  if (form != FXQUANT_SOFTMAX_THREE_PASS && n > kPart && is_uneven) {
    std::vector<FxquantSoftmaxSum> sums((n + kPart - 1) / kPart);
    for (int64_t r = 0; r < rows; r++) long_row(x + r * n, y + r * n, n, log, form, sums);
    return;
  }
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / n), [&](int64_t begin, int64_t end) {
    fxquant_softmax_rows(x + begin * n, y + begin * n, end - begin, n, log, form);
  });
}

Tensor checked(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "fxquant::softmax: the input must be float32");
  STD_TORCH_CHECK(x.dim() >= 1 && (dim == -1 || dim == x.dim() - 1),
                  "fxquant::softmax: only the last dimension has a kernel; got dimension ", dim, " of ", x.dim(),
                  "; move it to the end");
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

void into(const Tensor& x, bool log, int32_t form, const Tensor& out) {
  if (x.numel() == 0) return;
  const int64_t n = x.size(x.dim() - 1);
  run(static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), x.numel() / n, n, log,
      form < 0 ? fxquant_softmax_form(n) : form);
}

Tensor softmax(const Tensor& x, int64_t dim, bool log) {
  const Tensor rows = checked(x, dim);
  Tensor out = torch::stable::empty_like(rows);
  into(rows, log, -1, out);
  return out;
}

// The same into a given tensor, by a given form (-1: the table's).
void softmax_into(const Tensor& x, bool log, int64_t form, Tensor out) {
  const Tensor rows = checked(x, -1);
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous() && out.numel() == x.numel(),
                  "fxquant::softmax_into: out must be contiguous float32 of the input's size");
  STD_TORCH_CHECK(form >= -1 && form <= FXQUANT_SOFTMAX_BLOCKED, "fxquant::softmax_into: there is no form ", form);
  into(rows, log, static_cast<int32_t>(form), out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_into", TORCH_BOX(&softmax_into));
}
