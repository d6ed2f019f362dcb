// Softmax for AVX2 with FMA.
#include "softmax_body.h"
#include "vector_avx2.h"

namespace fxquant {

const SoftmaxKernels kSoftmaxAvx2 = softmax_kernels<VectorAvx2>();

}  // namespace fxquant
