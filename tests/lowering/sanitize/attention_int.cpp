// Attention on codes: widths, masks of both kinds, the causal rule, grouped heads, ragged sizes, strides, two key blocks, and
// both ways to share the work. Codes, sums and weights must be those of the scalar kernels.
#include "attention_int.h"

#include "harness.h"

#include <array>

namespace sanitize {
namespace {

constexpr double kTolerance = 2e-5;

// As many workers as were asked for, one after the other.
void in_turn(void*, int64_t workers, void (*body)(void*), void* context) {
  for (int64_t i = 0; i < workers; i++) body(context);
}

struct Shape {
  int64_t heads, kv_heads, n, m, d, e;
};
constexpr Shape kShapes[] = {{1, 1, 1, 1, 1, 1},    {2, 1, 7, 33, 5, 17},   {1, 1, 13, 16, 16, 16}, {3, 3, 98, 19, 33, 9},
                             {4, 2, 9, 70, 64, 33}, {1, 1, 3, 40, 129, 24}, {3, 1, 40, 520, 8, 7}};

void shape(Run& run, const Shape& s, int32_t qk_bits, int32_t pv_bits, int32_t variant) {
  const auto [heads, kv_heads, n, m, d, e] = s;
  const int64_t pad = variant % 2, queries = heads * n, keys = kv_heads * m;
  const bool finite = variant != 3;
  const Guarded<float> q = finite ? run.normals(queries * (d + pad)) : run.rows(queries, d, d + pad);
  const Guarded<float> k = finite ? run.normals(keys * (d + pad), 3.f) : run.rows(keys, d, d + pad);
  const Guarded<float> v = run.normals(keys * (e + pad)), added = run.normals(n * m);
  const Guarded<uint8_t> hidden = run.buffer<uint8_t>(m);
  for (uint8_t& seen : hidden) seen = run.random() % 4 != 0;
  const Guarded<float> out = run.buffer<float>(queries * e);
  fxquant_attention_problem p{};
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data();
  p.batch = 1, p.heads = heads, p.kv_heads = kv_heads, p.queries = n, p.keys = m, p.depth = d, p.value_depth = e;
  p.q_stride[1] = n * (d + pad), p.q_stride[2] = d + pad, p.k_stride[1] = m * (d + pad), p.k_stride[2] = d + pad;
  p.v_stride[1] = m * (e + pad), p.v_stride[2] = e + pad, p.out_stride[1] = n * e, p.out_stride[2] = e;
  p.scale = 0.3f, p.causal = variant == 2;
  if (variant == 0) p.mask = added.data(), p.mask_kind = FXQUANT_MASK_FLOAT, p.mask_stride[2] = m, p.mask_stride[3] = 1;
  if (variant == 1) p.mask = hidden.data(), p.mask_kind = FXQUANT_MASK_BOOL, p.mask_stride[3] = 1;
  const Guarded<int8_t> q_codes = run.buffer<int8_t>(queries * d), k_codes = run.buffer<int8_t>(keys * d);
  const Guarded<float> q_scales = run.buffer<float>(queries), k_scales = run.buffer<float>(keys);
  const Guarded<int32_t> sums = run.buffer<int32_t>(queries * m);
  const Guarded<uint8_t> weights = run.buffer<uint8_t>(queries * m);
  if (p.causal) {  // what a row does not see depends on the height of the strips
    for (int32_t& sum : sums) sum = 0;
    for (uint8_t& weight : weights) weight = 0;
  }
  const fxquant_attention_trace trace{q_codes.data(), k_codes.data(), q_scales.data(), k_scales.data(), sums.data(), weights.data()};
  fxquant_attention_int(&p, qk_bits, pv_bits, &trace, 1 + variant % 2, in_turn, nullptr);
  if (p.causal)
    for (int64_t i = 0; i < queries; i++)
      for (int64_t j = i % n + 1; j < m; j++) sums[i * m + j] = 0, weights[i * m + j] = 0;
  const std::string label = "qk" + std::to_string(qk_bits) + " pv" + std::to_string(pv_bits) + " variant " + std::to_string(variant) +
                            " " + std::to_string(n) + "x" + std::to_string(m) + "x" + std::to_string(d) + "x" + std::to_string(e);
  run.exact(label + " codes of q", q_codes);
  run.exact(label + " codes of k", k_codes);
  run.exact(label + " scales of q", q_scales);
  run.exact(label + " scales of k", k_scales);
  run.exact(label + " sums", sums);
  if (pv_bits) run.exact(label + " weights", weights);
  pv_bits ? run.exact(label, out) : run.close(label, out, kTolerance);
  fxquant_attention_int(&p, qk_bits, pv_bits, nullptr, 3, in_turn, nullptr);
  run.close(label + " untraced", out, pv_bits ? 0 : kTolerance);
}

void attention_int(Run& run) {
  for (const auto& [qk_bits, pv_bits] : {std::array<int32_t, 2>{6, 0}, {8, 0}, {6, 8}, {8, 8}})
    for (int32_t variant = 0; variant < 4; variant++)
      for (const Shape& s : kShapes) shape(run, s, qk_bits, pv_bits, variant);
}

const Case kCase("attention_int", attention_int);

}  // namespace
}  // namespace sanitize
