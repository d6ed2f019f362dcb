// What an instruction set gives to the driver of attention with logarithmic codes.
#pragma once
#include <cstdint>

namespace fxquant::attention {

// The largest score of a row, and the sum of 2^(score - largest): no less than 1 where the row sees a key.
struct LogSum {
  float largest, sum;
};

// How the scores of a row become codes.
struct LogRow {
  float lse, factor, zero;
};

constexpr int64_t kMostTables = 8;

// Tables of weights, one after the other, of `size` entries each.
struct LogTables {
  const float* first;
  int64_t count, size;
};

// What an instruction set gives to the driver.
struct LogKernels {
  // to[r][c] = rne(min(max(x[r][c] / scale[c], low[c]), high[c])), a NaN stays. Whether there is one. Rows of `to` are `width`
  // long, scale, low and high have room for whole vectors.
  bool (*code_rows)(const float* x, int64_t ld, int64_t rows, int64_t width, const float* scale, const float* low,
                    const float* high, float* to);
  // Scores from `count` to `padded`, a multiple of 16, become minus infinity.
  LogSum (*sum)(float* s, int64_t count, int64_t padded);
  // Scores become weights by code = rne(min(max(factor (lse - s), 0), zero)), `zero` for NaN: those of the first table in their
  // place, the next ones in `others`, `stride` apart. codes may be null. Returns a bit for each table with a weight above 0.
  uint32_t (*weigh)(float* s, int64_t padded, const LogRow& row, const LogTables& tables, float* others, int64_t stride,
                    int32_t* codes);
  // to[c] = (sums[c] units[0] + sums[c + stride] units[1] + ...) scale[c], from left to right. scale has room for whole vectors.
  void (*finish)(const float* sums, int64_t stride, const float* units, int64_t count, const float* scale, int64_t width,
                 float* to);
};

extern const LogKernels kLogScalar, kLogAvx2, kLogAvx512;

}  // namespace fxquant::attention
