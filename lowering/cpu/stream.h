// The C interface of the decode kernels: linears that read their weight as one linear stream. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// Bytes of a packed weight [n, k]. weight_bits 2, 4 or 8; act_bits 8 or 16 (float); group: k values of one scale, 0 = k.
FXQUANT_EXPORT int64_t fxquant_stream_packed_bytes(
    int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int32_t group);
// codes int8 [n, k], scales float [n, groups] -> out. 0: packed; 1: a code is out of range.
FXQUANT_EXPORT int32_t fxquant_stream_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int32_t group,
    uint8_t* out);
// The same for 4-bit codes 0 .. 15 that stand for the 16 values of a table, and float activations.
FXQUANT_EXPORT int64_t fxquant_stream_table_bytes(int64_t n, int64_t k, int32_t group);
FXQUANT_EXPORT int32_t fxquant_stream_pack_table(
    const int8_t* codes, const float* values, const float* scales, int64_t n, int64_t k, int32_t group, uint8_t* out);
// The way back, for tests: codes int8 [n, k] and scales float [n, groups] of a packed weight.
FXQUANT_EXPORT void fxquant_stream_unpack(const uint8_t* packed, int8_t* codes, float* scales);
// Output features n and input features k of a packed weight.
FXQUANT_EXPORT int64_t fxquant_stream_columns(const uint8_t* packed);
FXQUANT_EXPORT int64_t fxquant_stream_features(const uint8_t* packed);
// Bytes of the scratch memory for m rows.
FXQUANT_EXPORT int64_t fxquant_stream_scratch_bytes(const uint8_t* packed, int64_t m);
// Rows and columns of one task for fxquant_stream_run; threads: how many there are -> how many have enough to do. Tasks
// follow one another in memory, so a thread that takes a range of them reads one linear stream.
FXQUANT_EXPORT void fxquant_stream_tiles(
    const uint8_t* packed, int64_t m, int64_t* threads, int64_t* rows, int64_t* columns);
// Puts rows m0 <= i < m1 of x (float, row stride ldx) into the form that the kernels multiply, in the scratch of m rows.
FXQUANT_EXPORT void fxquant_stream_prepare(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t m, const uint8_t* packed, uint8_t* scratch);
// out[(i - m0) * ldo + (j - n0)] = y[i][j] for m0 <= i < m1, n0 <= j < n1, n0 % 16 == 0; bias: float [n] or null. The rows
// are read from the scratch; x and ldx are there for a kernel that would read them in place.
FXQUANT_EXPORT void fxquant_stream_run(
    const float* x, int64_t ldx, const uint8_t* scratch, int64_t m, const uint8_t* packed, const float* bias, int64_t m0,
    int64_t m1, int64_t n0, int64_t n1, float* out, int64_t ldo);
// Integer activations, for tests: out int32 [m][groups][n] = sum over the group of (q_x - zero_point) q_w.
FXQUANT_EXPORT void fxquant_stream_sums(const uint8_t* scratch, int64_t m, const uint8_t* packed, int32_t* out);
// Both at once on the calling thread, for m rows: what a row program calls.
FXQUANT_EXPORT void fxquant_stream_linear(
    const float* x, int64_t ldx, int64_t m, const uint8_t* packed, const float* bias, int64_t n0, int64_t n1, float* out,
    int64_t ldo);
}
