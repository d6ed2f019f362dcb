// The C interface of the float linear kernels: what the operator calls. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// Bytes of a packed weight [n, k]; depends on nothing else, so a packed weight is a graph input of fixed shape.
FXQUANT_EXPORT int64_t fxquant_float_packed_bytes(int64_t n, int64_t k);
// weight float [n, k] -> out.
FXQUANT_EXPORT void fxquant_float_pack(const float* weight, int64_t n, int64_t k, uint8_t* out);
// Rows and columns of one output tile, so that every thread has work.
FXQUANT_EXPORT void fxquant_float_tiles(int64_t m, int64_t n, int64_t threads, int64_t* rows, int64_t* columns);
// out[(i - m0) * ldo + (j - n0)] = sum_k x[i][k] w[j][k] + bias[j] for m0 <= i < m1, n0 <= j < n1; n0 % 16 == 0; x has
// row stride ldx; bias may be null. One output's order of additions depends on k alone.
FXQUANT_EXPORT void fxquant_float_tile(
    const float* x, int64_t ldx, const uint8_t* packed, const float* bias, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    float* out, int64_t ldo);
}
