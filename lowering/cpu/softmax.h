// The C interface of the softmax kernels: contiguous rows of float32. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

// How a row is computed. 0 three-pass: max, exp + store + sum, multiply. 1 two-pass: sums of (mantissa, exponent) pairs,
// then write. 2 blocked two-pass: each block of a row is read twice while it is in the first-level cache, then write.
// The forms that read a row twice write past the caches.
#define FXQUANT_SOFTMAX_THREE_PASS 0
#define FXQUANT_SOFTMAX_TWO_PASS 1
#define FXQUANT_SOFTMAX_BLOCKED 2
// Elements of the parts that a long row is summed in, whoever computes them: any number of threads gives the same bits.
#define FXQUANT_SOFTMAX_PART 65536

extern "C" {
// sum = sum_i e^(x_i - top) for the blocked form, sum_i e^x_i = sum * 2^top for the two-pass form.
struct FxquantSoftmaxSum {
  double sum;
  double top;
};

// The form for rows of n elements; a pure function.
FXQUANT_EXPORT int32_t fxquant_softmax_form(int64_t n);
// Whole rows [rows, n], one after the other; log: log-softmax, which takes the forms three-pass and blocked.
FXQUANT_EXPORT void fxquant_softmax_rows(const float* x, float* y, int64_t rows, int64_t n, int32_t log, int32_t form);
// A row in steps that may run on several threads: parts [first, last) of its sum; all parts into one, in their order;
// then the elements of some parts. The merged sum may choose another form: write with the form that it returns.
FXQUANT_EXPORT void fxquant_softmax_sums(
    const float* x, int64_t n, int64_t first, int64_t last, int32_t form, FxquantSoftmaxSum* parts);
FXQUANT_EXPORT int32_t fxquant_softmax_merge(
    const float* x, int64_t n, int32_t form, const FxquantSoftmaxSum* parts, FxquantSoftmaxSum* total);
FXQUANT_EXPORT void fxquant_softmax_write(
    const float* x, float* y, int64_t n, int64_t first, int64_t last, int32_t log, int32_t form,
    const FxquantSoftmaxSum* total);
// e^x of count numbers, by the polynomial of the instruction set in force; for tests.
FXQUANT_EXPORT void fxquant_exp(const float* x, float* y, int64_t count);
}
