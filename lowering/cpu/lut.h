// The C interface of the look-up linear kernels (2-bit weights): what the operators call. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// Bytes of a packed weight [n, k]; depends on nothing else, so a packed weight is a graph input of fixed shape.
FXQUANT_EXPORT int64_t fxquant_lut_packed_bytes(int64_t n, int64_t k);
// codes int8 [n, k] of -1, 0 and 1, scales float [n] -> out. 0: packed; 1: a code is out of range.
FXQUANT_EXPORT int32_t fxquant_lut_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t act_bits, uint8_t* out);
// Bytes of the tables of one block of rows; 64-byte alignment is best, none is needed.
FXQUANT_EXPORT int64_t fxquant_lut_table_bytes(int64_t k);
// Rows of a block, and output columns of one task so that every thread has work: both for fxquant_lut_tile.
FXQUANT_EXPORT void fxquant_lut_tiles(int64_t m, int64_t n, int64_t threads, int64_t* rows, int64_t* columns);
// out[(i - m0) * ldo + (j - n0)] = float(sum) * (scale_x[i] * scale_w[j]) for m0 <= i < m1, n0 <= j < n1; n0 % 32 == 0.
// scratch: rows quantized by fxquant_quantize_rows; tables: fxquant_lut_table_bytes(k) of the caller's thread.
FXQUANT_EXPORT void fxquant_lut_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    uint8_t* tables, float* out, int64_t ldo);
// The same, but the int32 sums (zero point taken out).
FXQUANT_EXPORT void fxquant_lut_tile_int32(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    uint8_t* tables, int32_t* out, int64_t ldo);
}
