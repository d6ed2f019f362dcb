// The operators of attention with logarithmic codes on torch's stable ABI. Their schemas are defined in Python
// (fxquant/ops/attention_log.py).
#include "attention_log.h"
#include "attention_operands.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

using namespace fxquant;

namespace {

using Optional = std::optional<Tensor>;

// Qparams of one block, of one a head or, with `is_channel`, of one a channel.
struct QParams {
  Optional held;
  int64_t step = 0;

  QParams(const Optional& given, int64_t blocks, const char* what) {
    if (!given) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float, "fxquant::attention_log: ", what, " must be float32");
    STD_TORCH_CHECK(given->numel() == 1 || given->numel() == blocks, "fxquant::attention_log: ", what, " has ", given->numel(),
                    " values, 1 or ", blocks, " are needed");
    held = as_contiguous(*given);
    step = given->numel() == 1 ? 0 : 1;
  }
  const float* pointer() const { return held ? data<const float>(*held) : nullptr; }
};

// An operand's codes and the tensors that they are in.
struct Uniform {
  QParams scale, zero_point;
  fxquant_uniform_codes codes{};

  Uniform(const Optional& s, const Optional& z, int64_t blocks, bool is_channel, int64_t top, const char* what)
      : scale(s, blocks, what), zero_point(z, blocks, what) {
    STD_TORCH_CHECK(!zero_point.held || (scale.held && scale.step == zero_point.step), "fxquant::attention_log: ", what,
                    " has another number of zero points than of scales");
    STD_TORCH_CHECK(!scale.held || (0 < top && top < 256), "fxquant::attention_log: ", what, " has codes up to ", top,
                    ", at most 255 are known");
    codes.scale = scale.pointer(), codes.zero_point = zero_point.pointer(), codes.top = static_cast<int32_t>(top);
    (is_channel ? codes.channel_step : codes.head_step) = scale.step;
  }
};

struct LogCall {
  Call call;
  Uniform q, k, v;
  QParams scale, base;
  fxquant_log_attention format{};
};

LogCall log_call(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, bool causal,
                 std::optional<double> scale, const Optional& q_scale, const Optional& q_zero_point, const Optional& k_scale,
                 const Optional& k_zero_point, const Tensor& v_scale, const Optional& v_zero_point, const Tensor& p_scale,
                 const Optional& p_base, int64_t q_top, int64_t k_top, int64_t v_top, bool per_channel, int64_t family,
                 int64_t width, int64_t codes) {
  Call call = call_of(query, key, value, mask, causal, scale);
  const fxquant_attention_problem p = call.p;
  STD_TORCH_CHECK(p.depth <= 256, "fxquant::attention_log: a head has ", p.depth, " values, at most 256 have exact sums");
  STD_TORCH_CHECK(q_scale.has_value() == k_scale.has_value(), "fxquant::attention_log: q and k both have codes, or none has");
  STD_TORCH_CHECK(FXQUANT_LOG2 <= family && family <= FXQUANT_ADALOG && 2 <= width && width <= 8 && 2 < codes && codes <= 256,
                  "fxquant::attention_log: no such codes: family ", family, ", ", width, " bits, ", codes, " codes");
  STD_TORCH_CHECK(p_base.has_value() == (family == FXQUANT_ADALOG), "fxquant::attention_log: AdaLog alone has a base");
  LogCall made{call,
               {q_scale, q_zero_point, p.heads, false, q_top, "q"},
               {k_scale, k_zero_point, p.kv_heads, false, k_top, "k"},
               {v_scale, v_zero_point, per_channel ? p.value_depth : p.kv_heads, per_channel, v_top, "v"},
               {p_scale, p.heads, "the scale of the weights"},
               {p_base, p.heads, "the base of the weights"}};
  STD_TORCH_CHECK(!p_base || made.base.step == made.scale.step,
                  "fxquant::attention_log: the weights have another number of bases than of scales");
  made.format = {made.q.codes,
                 made.k.codes,
                 made.v.codes,
                 {made.scale.pointer(), made.base.pointer(), made.scale.step, static_cast<int32_t>(family),
                  static_cast<int32_t>(width), static_cast<int32_t>(codes)}};
  return made;
}

template <typename... Given>
Tensor attention_log(Given... given) {
  const LogCall made = log_call(given...);
  fxquant_attention_log(&made.call.p, &made.format, nullptr, threads(), parallel, nullptr);
  return made.call.out;
}

using Trace = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename... Given>
Trace attention_log_trace(Given... given) {
  const LogCall made = log_call(given...);
  const fxquant_attention_problem& p = made.call.p;
  const bool wide = made.call.q.dim() == 4;
  const auto zeros = [&](std::vector<int64_t> sizes, int64_t heads, ScalarType dtype) {
    if (!wide) sizes.erase(sizes.begin() + heads);
    Tensor empty = torch::stable::new_empty(made.call.q, sizes, dtype);
    return torch::stable::zero_(empty);
  };
  const int64_t planes = fxquant_attention_log_planes(&p, &made.format);
  const Tensor scores = zeros({p.batch, p.heads, p.queries, p.keys}, 1, ScalarType::Float);
  const Tensor lse = zeros({p.batch, p.heads, p.queries}, 1, ScalarType::Float);
  const Tensor codes = zeros({p.batch, p.heads, p.queries, p.keys}, 1, ScalarType::Short);
  const Tensor sums = zeros({planes, p.batch, p.heads, p.queries, p.value_depth}, 2, ScalarType::Float);
  const fxquant_log_trace trace{data<float>(scores), data<float>(lse), data<int16_t>(codes), data<float>(sums)};
  fxquant_attention_log(&p, &made.format, &trace, threads(), parallel, nullptr);
  return {made.call.out, scores, lse, codes, sums};
}

template <typename Result>
using Operator = Result(Tensor, Tensor, Tensor, Optional, bool, std::optional<double>, Optional, Optional, Optional, Optional,
                        Tensor, Optional, Tensor, Optional, int64_t, int64_t, int64_t, bool, int64_t, int64_t, int64_t);

constexpr Operator<Tensor>* kAttention = &attention_log;
constexpr Operator<Trace>* kTrace = &attention_log_trace;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) {
  m.impl("attention_log", TORCH_BOX(kAttention));
  m.impl("attention_log_trace", TORCH_BOX(kTrace));
}
