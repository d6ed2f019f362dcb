// What the operators of attention share: the operands of a call as a problem (attention.h).
#pragma once
#include "attention.h"
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace fxquant {
namespace {

// Batch, head and row strides; a tensor of three dimensions has one head.
void strides_of(const Tensor& x, int64_t* to) {
  const bool wide = x.dim() == 4;
  to[0] = x.stride(0);
  to[1] = wide ? x.stride(1) : 0;
  to[2] = x.stride(x.dim() - 2);
}

void set_mask(fxquant_attention_problem& p, const Tensor& mask, bool wide) {
  const bool known = mask.scalar_type() == ScalarType::Bool || mask.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(known, "fxquant::attention: the mask must be bool or float32");
  const int64_t dims = wide ? 4 : 3, sizes[4] = {p.batch, p.heads, p.queries, p.keys};
  STD_TORCH_CHECK(mask.dim() <= dims, "fxquant::attention: the mask has more dimensions than the query");
  p.mask_kind = mask.scalar_type() == ScalarType::Bool ? FXQUANT_MASK_BOOL : FXQUANT_MASK_FLOAT;
  p.mask = mask.data_ptr();
  for (int64_t d = 0; d < mask.dim(); d++) {
    const int64_t from_end = mask.dim() - d;
    const int64_t axis = !wide && from_end == 3 ? 0 : 4 - from_end;
    STD_TORCH_CHECK(mask.size(d) == 1 || mask.size(d) == sizes[axis], "fxquant::attention: dimension ", d, " of the mask has ",
                    mask.size(d), " entries, 1 or ", sizes[axis], " are needed");
    p.mask_stride[axis] = mask.size(d) == 1 ? 0 : mask.stride(d);
  }
}

// [B, H, N, e] in memory of [B, N, H, e]: as the next linear reads it. One call: attention over few keys takes no longer.
Tensor heads_side_by_side(const fxquant_attention_problem& p) {
  const int64_t sizes[] = {p.batch, p.heads, p.queries, p.value_depth}, row = p.heads * p.value_depth;
  const int64_t strides[] = {p.queries * row, p.value_depth, row, 1};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(),
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

void parallel(void*, int64_t workers, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(context);
  });
}

// A call's problem and the tensors that its pointers belong to.
struct Call {
  Tensor q, k, v, out;
  fxquant_attention_problem p{};
};

Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, bool causal,
             std::optional<double> scale) {
  const int64_t dims = query.dim();
  const bool wide = dims == 4;
  STD_TORCH_CHECK((wide || dims == 3) && key.dim() == dims && value.dim() == dims,
                  "fxquant::attention: query, key and value must have 3 or 4 dimensions");
  for (const Tensor* x : {&query, &key, &value})
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, "fxquant::attention: query, key and value must be float32");
  Call made{with_dense_rows(query), with_dense_rows(key), with_dense_rows(value), query};
  const auto& [q, k, v, out, _] = made;
  fxquant_attention_problem& p = made.p;
  p.batch = q.size(0), p.heads = wide ? q.size(1) : 1, p.kv_heads = wide ? k.size(1) : 1;
  p.queries = q.size(dims - 2), p.keys = k.size(dims - 2), p.depth = q.size(dims - 1), p.value_depth = v.size(dims - 1);
  STD_TORCH_CHECK(k.size(0) == p.batch && v.size(0) == p.batch && k.size(dims - 1) == p.depth &&
                      v.size(dims - 2) == p.keys && (!wide || v.size(1) == p.kv_heads),
                  "fxquant::attention: the shapes of query, key and value do not fit together");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "fxquant::attention: ", p.heads,
                  " query heads cannot share ", p.kv_heads, " key heads");
  STD_TORCH_CHECK(p.depth > 0 && p.value_depth > 0 && p.keys > 0, "fxquant::attention: a head or the keys are empty");
  strides_of(q, p.q_stride), strides_of(k, p.k_stride), strides_of(v, p.v_stride);
  p.q = data<const float>(q), p.k = data<const float>(k), p.v = data<const float>(v);
  p.causal = causal;
  p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.depth)));
  if (mask) set_mask(p, *mask, wide);
  made.out = wide ? heads_side_by_side(p) : torch::stable::new_empty(q, {p.batch, p.queries, p.value_depth});
  strides_of(made.out, p.out_stride);
  p.out = data<float>(made.out);
  return made;
}

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

}  // namespace
}  // namespace fxquant
