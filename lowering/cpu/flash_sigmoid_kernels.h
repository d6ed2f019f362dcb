// What every instruction set implements for sigmoid attention.
#pragma once
#include "flash_sigmoid.h"

namespace fxquant {

using SigmoidHead = FxquantSigmoidHead;

struct SigmoidKernels {
  void (*forward)(const SigmoidHead& head, int64_t first, int64_t last, void* out);
  void (*backward)(const SigmoidHead& head, const void* grad, void* grad_q, void* grad_k, void* grad_v);
};

extern const SigmoidKernels kSigmoidDouble, kSigmoidScalar, kSigmoidAvx2, kSigmoidAvx512;

}  // namespace fxquant
