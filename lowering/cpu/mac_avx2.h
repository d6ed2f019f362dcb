// A step of exact 16-bit products, shared by the AVX2 kernels of linears and of attention.
#pragma once
#include "simd.h"

namespace fxquant::avx2 {

// acc += madd(x, w) in 32 bits. The two-instruction form keeps gcc from hoisting loads and spilling accumulators.
inline void mac32(__m256i& acc, __m256i x, __m256i w) {
#if defined(__GNUC__) && !defined(FXQUANT_SIMDE)
  __m256i t;
  asm volatile("vpmaddwd %[w], %[x], %[t]\n\tvpaddd %[t], %[acc], %[acc]"
               : [acc] "+x"(acc), [t] "=&x"(t)
               : [w] "x"(w), [x] "x"(x));
#else
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, w));
#endif
}

}  // namespace fxquant::avx2
