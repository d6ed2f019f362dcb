// Fused attention as generated code calls it: pointers, one array of numbers, PyTorch's own threads. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// numbers: batch, heads, kv_heads, queries, keys, depth, value_depth; batch, head and row stride of q, k and v; the four
// strides of the mask (0 along an axis of size 1); its kind (attention.h); whether it is causal. The mask may be null. out is
// [batch, queries, heads, value_depth], contiguous.
FXQUANT_EXPORT void fxquant_attention_call(
    const float* q, const float* k, const float* v, const void* mask, float* out, const int64_t* numbers, float scale);
}
