// Picks the sigmoid attention kernels of the instruction set in force.
#include "flash_sigmoid.h"

#include "flash_sigmoid_kernels.h"
#include "isa.h"

using namespace fxquant;

namespace {

constexpr const SigmoidKernels* kTable[] = {&kSigmoidScalar, &kSigmoidAvx2, &kSigmoidAvx2, &kSigmoidAvx512};

const SigmoidKernels& kernels(const SigmoidHead& head) { return head.is_double ? kSigmoidDouble : *kTable[fxquant_isa()]; }

}  // namespace

extern "C" void fxquant_sigmoid_attention(const FxquantSigmoidHead* head, int64_t first, int64_t last, void* out) {
  kernels(*head).forward(*head, first, last, out);
}

extern "C" void fxquant_sigmoid_attention_gradients(
    const FxquantSigmoidHead* head, const void* grad, void* grad_q, void* grad_k, void* grad_v) {
  kernels(*head).backward(*head, grad, grad_q, grad_k, grad_v);
}
