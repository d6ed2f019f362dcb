// The attention operators on torch's stable ABI. Their schemas are defined in Python (fxquant/ops/attention.py).
#include "attention.h"
#include "attention_int.h"
#include "attention_operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

using namespace fxquant;

namespace {

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask, bool causal,
                 std::optional<double> scale) {
  const Call call = call_of(query, key, value, mask, causal, scale);
  fxquant_attention(&call.p, threads(), parallel, nullptr);
  return call.out;
}

Call quantized_call(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                    bool causal, std::optional<double> scale, int64_t qk_bits, int64_t pv_bits) {
  STD_TORCH_CHECK(qk_bits == 6 || qk_bits == 8, "fxquant::attention_int: q and k have codes of 6 or 8 bits, not ", qk_bits);
  STD_TORCH_CHECK(pv_bits == 0 || pv_bits == 8, "fxquant::attention_int: v has codes of 8 bits or (0) none, not ", pv_bits);
  Call call = call_of(query, key, value, mask, causal, scale);
  STD_TORCH_CHECK(call.p.depth <= FXQUANT_ATTENTION_INT_DEPTH, "fxquant::attention_int: a head has ", call.p.depth,
                  " values, at most ", FXQUANT_ATTENTION_INT_DEPTH, " have exact sums");
  return call;
}

Tensor attention_int(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask, bool causal,
                     std::optional<double> scale, int64_t qk_bits, int64_t pv_bits) {
  const Call call = quantized_call(query, key, value, mask, causal, scale, qk_bits, pv_bits);
  fxquant_attention_int(&call.p, static_cast<int32_t>(qk_bits), static_cast<int32_t>(pv_bits), nullptr, threads(), parallel, nullptr);
  return call.out;
}

using Trace = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Trace attention_int_trace(const Tensor& query, const Tensor& key, const Tensor& value, std::optional<Tensor> mask,
                          bool causal, std::optional<double> scale, int64_t qk_bits, int64_t pv_bits) {
  const Call call = quantized_call(query, key, value, mask, causal, scale, qk_bits, pv_bits);
  const fxquant_attention_problem& p = call.p;
  const auto zeros = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    if (query.dim() == 3) sizes.erase(sizes.begin() + 1);
    Tensor made = torch::stable::new_empty(call.q, sizes, dtype);
    return torch::stable::zero_(made);
  };
  const Tensor q_codes = zeros({p.batch, p.heads, p.queries, p.depth}, ScalarType::Char);
  const Tensor k_codes = zeros({p.batch, p.kv_heads, p.keys, p.depth}, ScalarType::Char);
  const Tensor q_scales = zeros({p.batch, p.heads, p.queries}, ScalarType::Float);
  const Tensor k_scales = zeros({p.batch, p.kv_heads, p.keys}, ScalarType::Float);
  const Tensor sums = zeros({p.batch, p.heads, p.queries, p.keys}, ScalarType::Int);
  const Tensor weights = zeros({p.batch, p.heads, p.queries, p.keys}, ScalarType::Byte);
  const fxquant_attention_trace trace{data<int8_t>(q_codes), data<int8_t>(k_codes), data<float>(q_scales),
                                      data<float>(k_scales), data<int32_t>(sums), data<uint8_t>(weights)};
  fxquant_attention_int(&p, static_cast<int32_t>(qk_bits), static_cast<int32_t>(pv_bits), &trace, threads(), parallel, nullptr);
  return {call.out, q_codes, k_codes, q_scales, k_scales, sums, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { 
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_int", TORCH_BOX(&attention_int));
  m.impl("attention_int_trace", TORCH_BOX(&attention_int_trace));
}
