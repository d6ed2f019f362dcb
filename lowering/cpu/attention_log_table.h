// What an instruction set gives to the driver of attention with logarithmic codes.
#pragma once
#include <cstdint>

namespace fxquant::attention {

// The largest score of a row, and the sum of 2^(score - largest): no less than 1 where the row sees a key.
struct LogSum {
  float largest, sum;
};

// What an instruction set gives to the driver.
struct LogKernels {
  // to[r][c] = rne(min(max(x[r][c] / scale[c], low[c]), high[c])), a NaN stays. Whether there is one. Rows of `to` are `width`
  // long, scale, low and high have room for whole vectors.
  bool (*code_rows)(const float* x, int64_t ld, int64_t rows, int64_t width, const float* scale, const float* low,
                    const float* high, float* to);
  void (*multiply)(float* s, int64_t count, float by);
  // Scores from `count` to `padded`, a multiple of 16, become minus infinity.
  LogSum (*sum)(float* s, int64_t count, int64_t padded);
  // codes = rne(min(max(factor (lse - s), 0), zero)) in the place of the scores; `zero` for NaN.
  void (*code)(float* s, int64_t padded, float lse, float factor, float zero, int32_t* codes);
  void (*look_up)(const int32_t* codes, int64_t padded, const float* table, int64_t size, float* to);
};

extern const LogKernels kLogScalar, kLogAvx2, kLogAvx512;

}  // namespace fxquant::attention
