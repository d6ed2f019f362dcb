// The portable decode kernels: what every other path must equal in its codes and integer sums.
#include "stream_layout.h"

namespace fxquant::stream {
namespace {

int64_t code_at(const uint8_t* step, const StreamLayout& l, int64_t k, int64_t column) {
  const Place place(l.bits, k, column);
  if (l.bits == 8) return static_cast<int8_t>(step[place.byte]);
  return ((step[place.byte] >> place.shift) & ((1 << l.bits) - 1)) - l.bias();
}

void unpack_float(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, float* to) {
  for (int64_t s = first; s < last; s++) {
    const float* scales = reinterpret_cast<const float*>(panel + l.tail_at(s / l.group_steps));
    for (int64_t k = 0; k < l.step_k; k++)
      for (int64_t c = 0; c < kPanel; c++)
        *to++ = static_cast<float>(code_at(panel + l.step_at(s), l, k, c)) * scales[c];
  }
}

void unpack_bytes(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, uint8_t* to) {
  for (int64_t s = first; s < last; s++, to += 2 * kStepBytes) {
    const uint8_t* step = panel + l.step_at(s);
    for (int64_t b = 0; b < kStepBytes; b++) {
      to[b] = step[b] & 15;
      to[kStepBytes + b] = step[b] >> 4;
    }
  }
}

void tile_float(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t k, bool first, float* sums) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      float sum = first ? 0.f : sums[r * kPanel + c];
      for (int64_t i = 0; i < k; i++) sum += x[r * ldx + i] * w[i * kPanel + c];
      sums[r * kPanel + c] = sum;
    }
}

void tile_integer(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* w, int64_t k4, bool first, int32_t* sums) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      int32_t sum = first ? 0 : sums[r * kPanel + c];
      for (int64_t s = 0; s < k4; s++)
        for (int64_t j = 0; j < 4; j++) sum += x[r * stride + s * 4 + j] * w[s * kStepBytes + c * 4 + j];
      sums[r * kPanel + c] = sum;
    }
}

void fold(const int32_t* sums, const IntegerRows& x, int64_t groups, int64_t g, const Tail& tail, int64_t rows, float* out) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      const int32_t sum = sums[r * kPanel + c] + x.corrections[r * groups + g] + x.shifts[r] * tail.sum(c);
      out[r * kPanel + c] += static_cast<float>(sum) * (x.scales[r] * tail.scales[c]);
    }
}

}  // namespace

const StreamKernels kStreamScalar = {{nullptr, nullptr, nullptr}, nullptr, unpack_float, unpack_bytes, tile_float,
                                     tile_integer, fold, kRowBlock, kRowBlock, false};

}  // namespace fxquant::stream
