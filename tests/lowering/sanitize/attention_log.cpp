// Attention with logarithmic codes: families, small and large codes of q and k, masks of both kinds, the causal rule, grouped
// heads, ragged sizes, strides, and both ways to share the work. Every bit must be that of the scalar kernels, where q and k
// have codes.
#include "attention_log.h"

#include "harness.h"

namespace sanitize {
namespace {

// As many workers as were asked for, one after the other.
void in_turn(void*, int64_t workers, void (*body)(void*), void* context) {
  for (int64_t i = 0; i < workers; i++) body(context);
}

struct Shape {
  int64_t heads, kv_heads, n, m, d, e;
};
constexpr Shape kShapes[] = {{1, 1, 1, 1, 1, 1},    {2, 1, 7, 33, 5, 17},   {1, 1, 13, 16, 16, 16},
                             {3, 3, 98, 19, 33, 9}, {4, 2, 9, 70, 64, 33}, {3, 1, 40, 260, 8, 7}};
struct Codes {
  int32_t family, width, codes;
};
constexpr Codes kCodes[] = {{FXQUANT_LOG2, 4, 16}, {FXQUANT_LOG_SQRT2, 4, 15}, {FXQUANT_ADALOG, 4, 16}, {FXQUANT_ADALOG, 6, 64}};

void shape(Run& run, const Shape& s, const Codes& codes, int32_t variant) {
  const auto [heads, kv_heads, n, m, d, e] = s;
  const int64_t pad = variant % 2, queries = heads * n, keys = kv_heads * m;
  const bool finite = variant != 3;
  const Guarded<float> q = finite ? run.normals(queries * (d + pad)) : run.rows(queries, d, d + pad);
  const Guarded<float> k = finite ? run.normals(keys * (d + pad), 3.f) : run.rows(keys, d, d + pad);
  const Guarded<float> v = finite ? run.normals(keys * (e + pad)) : run.rows(keys, e, e + pad);
  const Guarded<float> added = run.normals(n * m), steps = run.buffer<float>(heads), zeros = run.buffer<float>(heads);
  const Guarded<float> scales = run.buffer<float>(heads), bases = run.buffer<float>(heads), channels = run.buffer<float>(e);
  const bool is_small = variant >= 2;
  for (int64_t h = 0; h < heads; h++) {
    steps[h] = (is_small ? 0.3f : 0.02f) + 0.01f * h, zeros[h] = (is_small ? 6.f : 100.f) + h;
    scales[h] = 1.f, bases[h] = 9.f + 7.f * h;
  }
  for (float& step : channels) step = 0.03f;
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
  const fxquant_uniform_codes affine{steps.data(), zeros.data(), 1, 0, is_small ? 31 : 255};
  const fxquant_uniform_codes symmetric{channels.data(), nullptr, 0, 1, 127};
  const bool is_adaptive = codes.family == FXQUANT_ADALOG;
  const fxquant_log_attention format{
      affine, affine, variant % 2 ? symmetric : affine,
      {scales.data(), is_adaptive ? bases.data() : nullptr, 1, codes.family, codes.width, codes.codes}};
  const int64_t planes = fxquant_attention_log_planes(&p, &format);
  const Guarded<float> scores = run.buffer<float>(queries * m), lse = run.buffer<float>(queries);
  const Guarded<int16_t> found = run.buffer<int16_t>(queries * m);
  const Guarded<float> sums = run.buffer<float>(planes * queries * e);
  if (p.causal) {  // what a row does not see is left alone
    for (float& score : scores) score = 0;
    for (int16_t& code : found) code = 0;
  }
  const fxquant_log_trace trace{scores.data(), lse.data(), found.data(), sums.data()};
  fxquant_attention_log(&p, &format, &trace, 1 + variant % 2, in_turn, nullptr);
  const std::string label = "family " + std::to_string(codes.family) + " width " + std::to_string(codes.width) + " variant " +
                            std::to_string(variant) + " " + std::to_string(n) + "x" + std::to_string(m) + "x" +
                            std::to_string(d) + "x" + std::to_string(e);
  run.exact(label + " scores", scores);
  run.exact(label + " lse", lse);
  run.exact(label + " codes", found);
  run.exact(label + " sums", sums);
  run.exact(label, out);
  fxquant_attention_log(&p, &format, nullptr, 3, in_turn, nullptr);
  run.exact(label + " untraced", out);
  fxquant_log_attention in_float = format;  // of q and k
  in_float.q.scale = in_float.k.scale = nullptr;
  if (finite) fxquant_attention_log(&p, &in_float, nullptr, 1, in_turn, nullptr);
}

void attention_log(Run& run) {
  for (const Codes& codes : kCodes)
    for (int32_t variant = 0; variant < 4; variant++)
      for (const Shape& s : kShapes) shape(run, s, codes, variant);
}

const Case kCase("attention_log", attention_log);

}  // namespace
}  // namespace sanitize
