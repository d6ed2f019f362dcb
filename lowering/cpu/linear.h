// The C interface of the low-bit linear kernels: what generated code and the operators call. No torch headers.
#pragma once
#include <cstdint>

// A float tile of this size is 24 KiB: it stays in L1 while an epilogue runs over it.
#define FXQUANT_TILE_ROWS 96
#define FXQUANT_TILE_COLUMNS 64
// Most threads of one linear.
#define FXQUANT_SEATS 256

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// Bytes of a packed weight [n, k]; depends on nothing else, so a packed weight is a graph input of fixed shape.
FXQUANT_EXPORT int64_t fxquant_linear_packed_bytes(int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits);
// codes int8 [n, k], scales float [n] -> out. 0: packed; 1: a code is out of range; 2: no safe schedule exists.
FXQUANT_EXPORT int32_t fxquant_linear_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, uint8_t* out);
// Input features k of a packed weight.
FXQUANT_EXPORT int64_t fxquant_linear_features(const uint8_t* packed);
// Bytes of the scratch memory that holds m quantized rows of k values.
FXQUANT_EXPORT int64_t fxquant_linear_scratch_bytes(int64_t m, int64_t k, int32_t weight_bits, int32_t act_bits);
// Quantizes rows m0 <= i < m1 of x (float, row stride ldx) into the scratch memory of m rows.
FXQUANT_EXPORT void fxquant_quantize_rows(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t k, int32_t weight_bits, int32_t act_bits,
    uint8_t* scratch, int64_t m);
// The same with given steps [k] (>= FLT_MIN, finite) and one zero point (0 .. 2^act_bits - 1) for all rows. The packed weight
// is that of weight * step, so the scale of a row is 1.
FXQUANT_EXPORT void fxquant_quantize_rows_static(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t k, int32_t weight_bits, int32_t act_bits,
    const float* steps, const int32_t* zero_point, uint8_t* scratch, int64_t m);
// out[(i - m0) * ldo + (j - n0)] = float(sum) * (scale_x[i] * scale_w[j]) for m0 <= i < m1, n0 <= j < n1; n0 % 16 == 0.
FXQUANT_EXPORT void fxquant_linear_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    float* out, int64_t ldo);
// The same with bias[j] added last (null: none).
FXQUANT_EXPORT void fxquant_linear_bias_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, const float* bias, int64_t m0, int64_t m1, int64_t n0,
    int64_t n1, float* out, int64_t ldo);
// The same, but the int32 sums (zero point taken out).
FXQUANT_EXPORT void fxquant_linear_tile_int32(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t* out, int64_t ldo);
// A linear that several threads work on at once, in one parallel region: each calls fxquant_team_quantize, which returns
// when all rows have their codes, and then takes tiles until there are none. A thread starts with the share of its seat,
// which is the same in every call, and then helps the others: any number of threads does, also one after the other.
//   FxquantTeam team;
//   fxquant_team_start(&team, m, n, k, weight_bits, act_bits, threads);
//   in thread number `seat`, 0 <= seat < team.threads:
//     fxquant_team_quantize(&team, seat, x, ldx, nullptr, nullptr, scratch);
//     FxquantTile tile;
//     while (fxquant_team_tile(&team, seat, &tile)) ... the linear of that tile ...
struct FxquantSeat {
  alignas(64) int64_t next_row, next_tile;  // claimed so far; on a cache line of their own
};
struct FxquantTeam {
  int64_t m, n, k, threads;  // threads: those worth starting, at most the ones asked for
  int64_t chunk, rows, columns;
  int32_t weight_bits, act_bits;
  alignas(64) int64_t rows_done;
  FxquantSeat seats[FXQUANT_SEATS];
};
struct FxquantTile {
  int64_t m0, m1, n0, n1;  // rows m0 <= i < m1, columns n0 <= j < n1: at most FXQUANT_TILE_ROWS x FXQUANT_TILE_COLUMNS
};
FXQUANT_EXPORT void fxquant_team_start(
    FxquantTeam* team, int64_t m, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int64_t threads);
// Quantizes rows of x as fxquant_quantize_rows does (steps is null), or as fxquant_quantize_rows_static.
FXQUANT_EXPORT void fxquant_team_quantize(
    FxquantTeam* team, int64_t seat, const float* x, int64_t ldx, const float* steps, const int32_t* zero_point,
    uint8_t* scratch);
// Sets the next tile for this thread; 0 where none is left.
FXQUANT_EXPORT int32_t fxquant_team_tile(FxquantTeam* team, int64_t seat, FxquantTile* tile);
// Rows and columns of one output tile: at most FXQUANT_TILE_ROWS x FXQUANT_TILE_COLUMNS, enough tiles for all threads.
FXQUANT_EXPORT void fxquant_linear_tiles(
    int64_t m, int64_t n, int32_t weight_bits, int32_t act_bits, int64_t threads, int64_t* rows, int64_t* columns);
}
