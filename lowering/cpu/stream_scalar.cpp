// The portable decode kernels: what every other path must equal in its codes and integer sums.
#include "stream_layout.h"

namespace fxquant::stream {
namespace {

int32_t code_at(const uint8_t* step, const StreamLayout& l, int64_t k, int64_t column) {
  const Place place(l.bits, k, column);
  if (l.bits == 8) return static_cast<int8_t>(step[place.byte]);
  return (step[place.byte] >> place.shift) & ((1 << l.bits) - 1);
}

// sum + the codes of group g and a column, as they are stored, times x.
template <typename Number, typename T>
Number group_sum(const T* x, const uint8_t* panel, const StreamLayout& l, int64_t g, int64_t column, Number sum) {
  for (int64_t s = g * l.group_steps; s < g * l.group_steps + l.steps_of(g); s++)
    for (int64_t k = 0; k < l.step_k; k++)
      sum += x[s * l.step_k + k] * static_cast<Number>(code_at(panel + l.step_at(s), l, k, column));
  return sum;
}

template <int R>
void rows_float(const FloatRows& x, const uint8_t* panel, const StreamLayout& l, float* out) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      float y = 0;
      for (int64_t g = 0; g < l.groups; g++)
        y += group_sum(x.values + r * x.stride, panel, l, g, c, x.corrections[r * l.groups + g]) * Tail(panel, l, g).scales[c];
      out[r * kPanel + c] = y;
    }
}

template <int R>
void rows_table(const FloatRows& x, const uint8_t* panel, const StreamLayout& l, const float* table, float* out) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      float y = 0;
      for (int64_t g = 0; g < l.groups; g++) {
        float sum = 0;
        for (int64_t s = g * l.group_steps; s < g * l.group_steps + l.steps_of(g); s++)
          for (int64_t k = 0; k < l.step_k; k++)
            sum += x.values[r * x.stride + s * l.step_k + k] * table[code_at(panel + l.step_at(s), l, k, c)];
        y += sum * Tail(panel, l, g).scales[c];
      }
      out[r * kPanel + c] = y;
    }
}

template <int R>
void rows_integer(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out, int32_t* sums) {
  for (int64_t r = 0; r < R; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      float y = 0;
      for (int64_t g = 0; g < l.groups; g++) {
        const Tail tail(panel, l, g);
        const int32_t start = x.corrections[r * l.groups + g] + x.shifts[r] * tail.sum(c);
        const int32_t sum = group_sum(x.codes + r * x.stride, panel, l, g, c, start);
        y += static_cast<float>(sum) * (x.scales[r] * tail.scales[c]);
        if (sums != nullptr) sums[(r * l.groups + g) * kPanel + c] = sum;
      }
      out[r * kPanel + c] = y;
    }
}

}  // namespace

const StreamKernels kStreamScalar = {{{rows_float<1>, rows_float<2>, rows_float<3>, rows_float<4>},
                                      {rows_float<1>, rows_float<2>, rows_float<3>, rows_float<4>},
                                      {rows_float<1>, rows_float<2>, rows_float<3>, rows_float<4>}},
                                     {rows_table<1>, rows_table<2>, rows_table<3>, rows_table<4>},
                                     {rows_integer<1>, rows_integer<2>, rows_integer<3>, rows_integer<4>}, false};

}  // namespace fxquant::stream
