// Softmax for AVX-512.
#include "softmax_body.h"
#include "vector_avx512.h"

namespace fxquant {

const SoftmaxKernels kSoftmaxAvx512 = softmax_kernels<VectorAvx512>();

}  // namespace fxquant
