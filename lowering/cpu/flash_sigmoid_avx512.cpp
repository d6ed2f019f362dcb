// Sigmoid attention for AVX-512.
#include "flash_sigmoid_body.h"
#include "vector_avx512.h"

namespace fxquant {

const SigmoidKernels kSigmoidAvx512 = sigmoid_kernels<VectorAvx512>();

}  // namespace fxquant
