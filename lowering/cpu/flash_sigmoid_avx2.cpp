// Sigmoid attention for AVX2 with FMA.
#include "flash_sigmoid_body.h"
#include "vector_avx2.h"

namespace fxquant {

const SigmoidKernels kSigmoidAvx2 = sigmoid_kernels<VectorAvx2>();

}  // namespace fxquant
