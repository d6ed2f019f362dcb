// Picks the softmax kernels of the instruction set in force, the form of a row, and merges sums.
#include "softmax.h"

#include "isa.h"
#include "softmax_kernels.h"

#include <algorithm>
#include <cmath>

using namespace fxquant;

namespace {

constexpr const SoftmaxKernels* kTable[] = {&kSoftmaxScalar, &kSoftmaxAvx2, &kSoftmaxAvx2, &kSoftmaxAvx512};
constexpr int64_t kPart = FXQUANT_SOFTMAX_PART;
// Largest |n| of a sum 2^n that the two-pass form keeps: e^x as (mantissa, exponent) loses bits for larger |x|.
constexpr double kWidestTop = 14427;

const SoftmaxKernels& kernels() { return *kTable[fxquant_isa()]; }

// a + b, both relative to their own e^top.
SoftmaxSum merged(SoftmaxSum a, SoftmaxSum b) {
  if (b.top == -INFINITY) return {a.sum + b.sum, a.top};  // 0, or NaN
  if (a.top == -INFINITY) return {a.sum + b.sum, b.top};
  const double top = std::max(a.top, b.top);
  return {a.sum * std::exp(a.top - top) + b.sum * std::exp(b.top - top), top};
}

SoftmaxSum merged_pairs(SoftmaxSum a, SoftmaxSum b) {
  const double top = std::max(a.top, b.top);
  return {a.sum * std::exp2(a.top - top) + b.sum * std::exp2(b.top - top), top};
}

SoftmaxSum sum_blocks(const float* x, int64_t n) {
  SoftmaxSum sum{0, -INFINITY};
  for (int64_t i = 0; i < n; i += kSoftmaxBlock)
    sum = merged(sum, kernels().sum_block(x + i, std::min(kSoftmaxBlock, n - i)));
  return sum;
}

bool is_paired(int32_t form) { return form == FXQUANT_SOFTMAX_TWO_PASS; }

SoftmaxSum sum_part(const float* x, int64_t n, int64_t part, int32_t form) {
  const int64_t begin = part * kPart, count = std::min(kPart, n - begin);
  return is_paired(form) ? kernels().sum_pairs(x + begin, count) : sum_blocks(x + begin, count);
}

SoftmaxSum nothing(int32_t form) { return {0, is_paired(form) ? -1e30 : -INFINITY}; }

int64_t parts_of(int64_t n) { return (n + kPart - 1) / kPart; }

SoftmaxSum sum_row(const float* x, int64_t n, int32_t form) {
  SoftmaxSum total = nothing(form);
  for (int64_t part = 0; part < parts_of(n); part++) {
    const SoftmaxSum sum = sum_part(x, n, part, form);
    total = is_paired(form) ? merged_pairs(total, sum) : merged(total, sum);
  }
  return total;
}

// The two-pass form holds no infinities and no huge numbers; the blocked form holds all.
int32_t checked(const float* x, int64_t n, int32_t form, SoftmaxSum* total) {
  if (!is_paired(form) || (std::abs(total->top) <= kWidestTop && std::isfinite(total->sum))) return form;
  *total = sum_row(x, n, FXQUANT_SOFTMAX_BLOCKED);
  return FXQUANT_SOFTMAX_BLOCKED;
}

// Writes elements [begin, end) of a row.
void write(const float* x, float* y, int64_t begin, int64_t end, bool log, int32_t form, SoftmaxSum total) {
  const SoftmaxKernels& kernel = kernels();
  const float top = static_cast<float>(total.top);
  const bool stream = form != FXQUANT_SOFTMAX_THREE_PASS;
  // A row of -inf alone has no softmax: NaN.
  const double value = total.top == -INFINITY ? NAN : log ? std::log(total.sum) : 1.0 / total.sum;
  const float factor = static_cast<float>(value);
  if (log)
    kernel.write_log(x + begin, y + begin, end - begin, top, factor, stream);
  else if (is_paired(form))
    kernel.write_pairs(x + begin, y + begin, end - begin, top, factor);
  else
    kernel.write_block(x + begin, y + begin, end - begin, top, factor, stream);
  if (stream) __builtin_ia32_sfence();
}

}  // namespace

extern "C" int32_t fxquant_softmax_form(int64_t n) {
  constexpr int64_t kCached = 1 << 19;
  return n <= kCached ? FXQUANT_SOFTMAX_THREE_PASS : FXQUANT_SOFTMAX_BLOCKED;
}

extern "C" void fxquant_softmax_rows(const float* x, float* y, int64_t rows, int64_t n, int32_t log, int32_t form) {
  for (int64_t r = 0; r < rows; r++, x += n, y += n) {
    if (form == FXQUANT_SOFTMAX_THREE_PASS && !log) {
      kernels().three_pass(x, y, n);
      continue;
    }
    SoftmaxSum total = sum_row(x, n, form);
    const int32_t chosen = checked(x, n, form, &total);
    fxquant_softmax_write(x, y, n, 0, parts_of(n), log, chosen, &total);
  }
}

extern "C" void fxquant_softmax_sums(
    const float* x, int64_t n, int64_t first, int64_t last, int32_t form, FxquantSoftmaxSum* parts) {
  for (int64_t part = first; part < last; part++) parts[part] = sum_part(x, n, part, form);
}

extern "C" int32_t fxquant_softmax_merge(
    const float* x, int64_t n, int32_t form, const FxquantSoftmaxSum* parts, FxquantSoftmaxSum* total) {
  *total = nothing(form);
  for (int64_t part = 0; part < parts_of(n); part++)
    *total = is_paired(form) ? merged_pairs(*total, parts[part]) : merged(*total, parts[part]);
  return checked(x, n, form, total);
}

// Backwards: what the sums read last is still in a cache.
extern "C" void fxquant_softmax_write(
    const float* x, float* y, int64_t n, int64_t first, int64_t last, int32_t log, int32_t form,
    const FxquantSoftmaxSum* total) {
  for (int64_t part = last - 1; part >= first; part--)
    write(x, y, part * kPart, std::min(n, (part + 1) * kPart), log, form, *total);
}

extern "C" void fxquant_exp(const float* x, float* y, int64_t count) { kernels().exp(x, y, count); }
