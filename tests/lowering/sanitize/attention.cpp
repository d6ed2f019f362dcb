// Float attention: masks of both kinds and any strides, the causal rule, heads in groups, keys in chunks and in blocks.
#include "attention.h"

#include "harness.h"

#include <algorithm>
#include <cmath>

namespace sanitize {
namespace {

struct Shape {
  int64_t batch, heads, kv_heads, n, m, d, e;
};
constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 1},       {2, 3, 3, 1, 37, 16, 16},   {1, 2, 2, 1, 515, 20, 33},  {1, 8, 2, 1, 300, 40, 40},
    {1, 1, 1, 3, 7, 3, 5},       {1, 12, 2, 1, 33, 64, 64},  {1, 2, 1, 7, 19, 16, 24},   {1, 1, 1, 13, 97, 33, 17},
    {2, 2, 2, 29, 21, 32, 32},   {1, 3, 3, 101, 45, 24, 40}, {1, 1, 1, 9, 530, 80, 80},  {1, 3, 1, 35, 17, 48, 48},
    {1, 1, 1, 11, 30, 256, 256}, {1, 2, 2, 5, 8, 128, 7},    {1, 3, 3, 98, 1030, 16, 8}, {1, 1, 1, 260, 34, 96, 96},
};
enum Variant { kPlain, kCausal, kBool, kKeysOnly, kFloat, kTurned, kVariants };

// Heads side by side in rows of `width` values, with a gap after each row.
void place(int64_t rows, int64_t heads, int64_t width, int64_t gap, int64_t* stride) {
  stride[1] = width, stride[2] = heads * width + gap, stride[0] = rows * stride[2];
}

void run_bodies(void*, int64_t workers, void (*body)(void*), void* context) {
  for (int64_t i = 0; i < workers; i++) body(context);
}

void shape(Run& run, const Shape& s, int variant) {
  const int64_t gap = variant % 2;
  fxquant_attention_problem p{};
  p.batch = s.batch, p.heads = s.heads, p.kv_heads = s.kv_heads;
  p.queries = s.n, p.keys = s.m, p.depth = s.d, p.value_depth = s.e;
  place(s.n, s.heads, s.d, gap, p.q_stride), place(s.m, s.kv_heads, s.d, gap, p.k_stride);
  place(s.m, s.kv_heads, s.e, gap, p.v_stride), place(s.n, s.heads, s.e, gap, p.out_stride);
  const Guarded<float> q = run.normals(s.batch * p.q_stride[0] - gap), k = run.normals(s.batch * p.k_stride[0] - gap);
  const Guarded<float> v = run.normals(s.batch * p.v_stride[0] - gap), out = run.buffer<float>(s.batch * p.out_stride[0] - gap);
  const Guarded<uint8_t> seen = run.buffer<uint8_t>(s.n * s.m), keys = run.buffer<uint8_t>(s.m);
  for (uint8_t& byte : seen) byte = run.random() % 3 != 0;
  for (uint8_t& byte : keys) byte = run.random() % 4 != 0;
  std::fill_n(seen.data(), s.m, uint8_t{0});  // a row with nothing to see
  const Guarded<float> added = run.normals(s.n * s.m);
  for (int64_t i = 0; i < added.size(); i += 5) added[i] = i % 2 ? -INFINITY : -3.4028234e38f;
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.scale = 0.3f;
  p.causal = variant == kCausal;
  const bool is_byte = variant == kBool || variant == kKeysOnly;
  if (variant >= kBool) p.mask_kind = is_byte ? FXQUANT_MASK_BOOL : FXQUANT_MASK_FLOAT;
  p.mask_stride[2] = variant == kTurned ? 1 : variant == kKeysOnly ? 0 : s.m;
  p.mask_stride[3] = variant == kTurned ? s.n : 1;
  p.mask = variant == kBool ? static_cast<const void*>(seen.data()) : variant == kKeysOnly ? keys.data() : nullptr;
  if (variant >= kFloat) p.mask = added.data();
  std::string label = "variant " + std::to_string(variant);
  for (const int64_t size : {s.heads, s.kv_heads, s.n, s.m, s.d, s.e}) label += " " + std::to_string(size);
  for (const int64_t workers : {1, 2}) {
    fxquant_attention(&p, workers, run_bodies, nullptr);
    run.close(label, out, 2e-5);
  }
}

void attention(Run& run) {
  for (const Shape& s : kShapes)
    for (int variant = 0; variant < kVariants; variant++) shape(run, s, variant);
}

const Case kCase("attention", attention);

}  // namespace
}  // namespace sanitize
