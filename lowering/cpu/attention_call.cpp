// Fused attention as generated code calls it: no dispatcher, no checks (the lowering knows every size), no copies.
#include "attention_call.h"

#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace {

void parallel(void*, int64_t workers, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(context);
  });
}

// Whether a row of `count` bytes holds no zero.
bool is_row_true(const uint8_t* row, int64_t count, int64_t stride) {
  if (stride == 0) return *row != 0;
  if (stride == 1) return std::memchr(row, 0, count) == nullptr;
  for (int64_t j = 0; j < count; j++)
    if (row[j * stride] == 0) return false;
  return true;
}

// Whether a mask hides no key at all: that of a batch without padding. Looking costs far less than adding it to the scores.
bool is_all_true(const fxquant_attention_problem& p) {
  const int64_t sizes[3] = {p.batch, p.heads, p.queries};
  int64_t counts[3];
  for (int d = 0; d < 3; d++) counts[d] = p.mask_stride[d] == 0 ? std::min<int64_t>(sizes[d], 1) : sizes[d];
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask);
  for (int64_t b = 0; b < counts[0]; b++)
    for (int64_t h = 0; h < counts[1]; h++)
      for (int64_t i = 0; i < counts[2]; i++) {
        const uint8_t* row = mask + b * p.mask_stride[0] + h * p.mask_stride[1] + i * p.mask_stride[2];
        if (!is_row_true(row, p.keys, p.mask_stride[3])) return false;
      }
  return true;
}

}  // namespace

extern "C" void fxquant_attention_call(
    const float* q, const float* k, const float* v, const void* mask, float* out, const int64_t* numbers, float scale) {
  const int64_t* next = numbers;
  fxquant_attention_problem p{};
  p.q = q, p.k = k, p.v = v, p.mask = mask, p.out = out, p.scale = scale;
  for (int64_t* size : {&p.batch, &p.heads, &p.kv_heads, &p.queries, &p.keys, &p.depth, &p.value_depth}) *size = *next++;
  for (int64_t* strides : {p.q_stride, p.k_stride, p.v_stride}) {
    std::copy_n(next, 3, strides);
    next += 3;
  }
  std::copy_n(next, 4, p.mask_stride);
  p.mask_kind = static_cast<int32_t>(next[4]);
  p.causal = static_cast<int32_t>(next[5]);
  p.out_stride[0] = p.queries * p.heads * p.value_depth, p.out_stride[1] = p.value_depth;
  p.out_stride[2] = p.heads * p.value_depth;
  if (p.mask_kind == FXQUANT_MASK_BOOL && is_all_true(p)) p.mask_kind = FXQUANT_MASK_NONE, p.mask = nullptr;
  fxquant_attention(&p, std::max<int64_t>(1, torch::stable::get_num_threads()), parallel, nullptr);
}
