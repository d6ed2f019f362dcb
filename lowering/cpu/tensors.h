// What the operator files share about tensors of torch's stable ABI.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fxquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensor itself where the values of a row lie side by side, whatever its other strides, else a contiguous copy.
inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// The sizes of x with its last one replaced.
inline std::vector<int64_t> sizes_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d + 1 < x.dim(); d++) sizes.push_back(x.size(d));
  sizes.push_back(last);
  return sizes;
}

// A linear's bias, checked and contiguous; `who` names the operator in the error.
inline std::optional<Tensor> checked_bias(const std::optional<Tensor>& bias, int64_t out_features, const char* who) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == out_features, who,
                  ": the bias must be float32 of ", out_features, " values");
  return as_contiguous(*bias);
}

}  // namespace fxquant
