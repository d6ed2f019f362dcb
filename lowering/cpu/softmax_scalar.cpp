// Softmax for any x86-64 CPU.
#include "softmax_body.h"
#include "vector_scalar.h"

namespace fxquant {

const SoftmaxKernels kSoftmaxScalar = softmax_kernels<VectorScalar<float>>();

}  // namespace fxquant
