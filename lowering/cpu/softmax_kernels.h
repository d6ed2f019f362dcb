// What every instruction set implements for softmax.
#pragma once
#include "softmax.h"

#include <cstdint>

namespace fxquant {

using SoftmaxSum = FxquantSoftmaxSum;

struct SoftmaxKernels {
  void (*three_pass)(const float* x, float* y, int64_t n);
  SoftmaxSum (*sum_pairs)(const float* x, int64_t n);  // of one part
  SoftmaxSum (*sum_block)(const float* x, int64_t n);  // of one block
  // y = e^x * factor: relative to 2^top, and to e^top; and x - top - factor
  void (*write_pairs)(const float* x, float* y, int64_t n, float top, float factor);
  void (*write_block)(const float* x, float* y, int64_t n, float top, float factor, bool stream);
  void (*write_log)(const float* x, float* y, int64_t n, float top, float factor, bool stream);
  void (*exp)(const float* x, float* y, int64_t n);
};

extern const SoftmaxKernels kSoftmaxScalar, kSoftmaxAvx2, kSoftmaxAvx512;

// Elements that are summed in float32 before they go to a double: a plain float sum of a row of millions loses 4e-4.
constexpr int64_t kSoftmaxBlock = 2048;

}  // namespace fxquant
