// What an instruction set gives to the attention driver.
#pragma once
#include <cstdint>

namespace fxquant::attention {

constexpr int64_t kKeyBlock = 512;   // keys between two rescalings; a block's scores of a strip of rows stay in L1
constexpr int64_t kRowBlock = 96;    // rows of a task
constexpr int64_t kDirectRows = 4;   // up to so many rows a key head, packing would cost more than it saves
constexpr int64_t kDirectKeys = 256; // keys of a task there; partial results are merged in order

// y[r][0..W) (+)= sum_i x[r][i] w[i][0..W)
using TileFn = void (*)(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t count, float* y, int64_t ldy,
                        bool first);

struct Kernels {
  int64_t panel;  // columns of a wide tile, twice those of a narrow one
  int64_t rows;   // most rows of a tile
  const TileFn* wide;    // [rows], for 1 row, 2 rows, ...
  const TileFn* narrow;
  float (*softmax)(float* s, int64_t count, int64_t padded, float* top, float* sum);
  void (*pack_keys)(const float* k, int64_t ld, int64_t rows, int64_t depth, float* to);
  void (*dot_rows)(const float* q, const float* k, int64_t ld, int64_t rows, int64_t depth, float* scores);
  void (*mix_rows)(const float* p, const float* v, int64_t ld, int64_t rows, int64_t depth, float* out);
};

extern const Kernels kScalar, kAvx2, kAvx512;

}  // namespace fxquant::attention
