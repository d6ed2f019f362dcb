// Sigmoid attention for any x86-64 CPU, in float32 and in float64.
#include "flash_sigmoid_body.h"
#include "vector_scalar.h"

namespace fxquant {

const SigmoidKernels kSigmoidScalar = sigmoid_kernels<VectorScalar<float>>();
const SigmoidKernels kSigmoidDouble = sigmoid_kernels<VectorScalar<double>>();

}  // namespace fxquant
