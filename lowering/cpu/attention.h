// The C interface of fused attention: what generated code and the operator call. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
enum { FXQUANT_MASK_NONE = 0, FXQUANT_MASK_BOOL = 1, FXQUANT_MASK_FLOAT = 2 };

// out[b][h][i] = softmax(scale q[b][h][i] k[b][g]^T + mask[b][h][i]) v[b][g] with g = h / (heads / kv_heads).
// Strides count elements: batch, head, row; the last dimension has stride 1. The mask's strides may be zero.
typedef struct {
  const float *q, *k, *v;
  const void* mask;
  float* out;
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3], mask_stride[4];
  int32_t mask_kind;
  int32_t causal;  // query i sees the keys up to i, as scaled_dot_product_attention has it
  float scale;
} fxquant_attention_problem;

// Runs body(context) `workers` times, at once where it can.
typedef void (*fxquant_parallel)(void* pool, int64_t workers, void (*body)(void* context), void* context);

// The result has the same bits for every number of workers.
FXQUANT_EXPORT void fxquant_attention(
    const fxquant_attention_problem* problem, int64_t workers, fxquant_parallel parallel, void* pool);
}
