// The C interface of attention with a quantized product of q and k. No torch headers.
#pragma once
#include "attention.h"

#define FXQUANT_ATTENTION_INT_DEPTH 1024  // values of a head whose sums are exact in float32

extern "C" {
// What the kernel computed on its way, for tests. Each pointer may be null; all arrays are contiguous.
typedef struct {
  int8_t *q_codes, *k_codes;   // [batch][heads][queries][depth], [batch][kv_heads][keys][depth]
  float *q_scales, *k_scales;  // one a row
  int32_t* sums;               // [batch][heads][queries][keys]; as `weights`: keys that a row does not see are left alone
  uint8_t* weights;            // with pv_bits, relative to the row's maximum at that key
} fxquant_attention_trace;

// As fxquant_attention, with q and k - mean(k) coded in `qk_bits` (6 or 8) bits, one scale a row, and exact integer sums.
// pv_bits 8: weights and values are coded too, 0: they stay float32. trace may be null.
FXQUANT_EXPORT void fxquant_attention_int(const fxquant_attention_problem* problem, int32_t qk_bits,
                                          int32_t pv_bits, const fxquant_attention_trace* trace, int64_t workers,
                                          fxquant_parallel parallel, void* pool);
}
