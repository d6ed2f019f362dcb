// The C interface of sigmoid attention, O = sigmoid(scale q kT + bias + mask - slope |i + M - N - j|) v. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// One head: q [n, d], k [m, d], v [m, e], all float32 or all float64; strides in elements, 1 between the columns of q
// and v. mask [n, m] may have strides of 0; hidden keys have weight 0. The causal rule lets query i see the keys
// j <= i + m - n.
struct FxquantSigmoidHead {
  const void *q, *k, *v, *mask;
  int64_t n, m, d, e;
  int64_t q_row, k_row, k_column, v_row, mask_row, mask_column;
  double scale, bias, slope;
  int32_t mask_kind;  // 0 none, 1 added numbers of the type of q, 2 bytes: 0 hides
  int32_t causal, is_double;
};

// Rows [first, last) of the output; out is the whole output [n, e].
FXQUANT_EXPORT void fxquant_sigmoid_attention(const FxquantSigmoidHead* head, int64_t first, int64_t last, void* out);
// Gradients of q, k and v (contiguous) from that of the output (contiguous [n, e]).
FXQUANT_EXPORT void fxquant_sigmoid_attention_gradients(
    const FxquantSigmoidHead* head, const void* grad, void* grad_q, void* grad_k, void* grad_v);
}
