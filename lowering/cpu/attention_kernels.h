// The float attention kernels as templates over a vector type; each instruction set's file instantiates them.
//
// A vector type has kLanes, load, store, load_part, store_part (the first n lanes), set1, add, sub, mul, max (the second
// operand where one is NaN), fma, exponent (low bits to the exponent field) sum4 (of the lanes of four
// vectors) and transpose (a kBlock x kBlock square).
#pragma once
#include "attention_table.h"
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fxquant::attention {

// 2^t for t <= 0; at most 2.1 ulp off (polynomial 9.2e-8 relative, weighted to be exact at 0), exactly 0 below 2^-126.5.
// Adding the magic number rounds t to an integer n and leaves n + 127 in the low bits, ready to become an exponent.
template <typename V>
inline V exp2(V t) {
  const V magic = V::set1(12582912.f + 127.f);
  t = V::max(V::set1(-127.f), t);  // NaN stays
  const V n = V::add(t, magic);
  const V f = V::sub(t, V::sub(n, magic));
  V p = V::fma(V::set1(0x1.5bba14p-10f), f, V::set1(0x1.3cea88p-7f));
  p = V::fma(p, f, V::set1(0x1.c6b752p-5f));
  p = V::fma(p, f, V::set1(0x1.ebf9bcp-3f));
  p = V::fma(p, f, V::set1(0x1.62e42ap-1f));
  p = V::fma(p, f, V::set1(1.f));
  return V::mul(p, V::exponent(n));
}

// y[r][0..W) (+)= sum_i x[r][i] w[i][0..W) for R rows, W = 2 vectors or 1.
#define FXQUANT_DECLARE2(r) V a##r = V::set1(0.f), b##r = a##r;
#define FXQUANT_START2(r) a##r = V::load(y + r * ldy), b##r = V::load(y + r * ldy + V::kLanes);
#define FXQUANT_MAC2(r)                      \
  {                                          \
    const V s = V::set1(x[r * ldx + i]);     \
    a##r = V::fma(s, w0, a##r), b##r = V::fma(s, w1, b##r); \
  }
#define FXQUANT_STORE2(r) V::store(y + r * ldy, a##r), V::store(y + r * ldy + V::kLanes, b##r);
#define FXQUANT_DECLARE1(r) V a##r = V::set1(0.f);
#define FXQUANT_START1(r) a##r = V::load(y + r * ldy);
#define FXQUANT_MAC1(r) a##r = V::fma(V::set1(x[r * ldx + i]), w0, a##r);
#define FXQUANT_STORE1(r) V::store(y + r * ldy, a##r);
#define FXQUANT_TILE(R)                                                                                        \
  template <typename V>                                                                                        \
  void wide_##R(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t count, float* y, int64_t ldy, \
                bool first) {                                                                                  \
    FXQUANT_ROWS_##R(FXQUANT_DECLARE2) if (!first) { FXQUANT_ROWS_##R(FXQUANT_START2) }                        \
    for (int64_t i = 0; i < count; i++, w += ldw) {                                                            \
      const V w0 = V::load(w), w1 = V::load(w + V::kLanes);                                                    \
      FXQUANT_ROWS_##R(FXQUANT_MAC2)                                                                           \
    }                                                                                                          \
    FXQUANT_ROWS_##R(FXQUANT_STORE2)                                                                           \
  }                                                                                                            \
  template <typename V>                                                                                        \
  void narrow_##R(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t count, float* y,           \
                  int64_t ldy, bool first) {                                                                   \
    FXQUANT_ROWS_##R(FXQUANT_DECLARE1) if (!first) { FXQUANT_ROWS_##R(FXQUANT_START1) }                        \
    for (int64_t i = 0; i < count; i++, w += ldw) {                                                            \
      const V w0 = V::load(w);                                                                                 \
      FXQUANT_ROWS_##R(FXQUANT_MAC1)                                                                           \
    }                                                                                                          \
    FXQUANT_ROWS_##R(FXQUANT_STORE1)                                                                           \
  }

// One row of scores becomes weights: s -> 2^(s - max). Returns what the earlier sum and output must be scaled by.
template <typename V>
float softmax(float* s, int64_t count, int64_t padded, float* top, float* sum) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr int64_t L = V::kLanes;
  std::fill(s + count, s + padded, kNone);
  V high0 = V::set1(kNone), high1 = high0;
  for (int64_t j = 0; j < padded; j += 2 * L) {
    high0 = V::max(high0, V::load(s + j));
    high1 = V::max(high1, V::load(s + j + L));
  }
  alignas(64) float lanes[L];
  V::store(lanes, V::max(high0, high1));
  const float highest = std::max(*top, *std::max_element(lanes, lanes + L));
  const float shift = highest == kNone ? 0.f : highest;  // a row with every key masked so far has weights 0
  const V by = V::set1(shift);
  V sum0 = V::set1(0.f), sum1 = sum0;
  for (int64_t j = 0; j < padded; j += 2 * L) {
    const V e0 = exp2(V::sub(V::load(s + j), by)), e1 = exp2(V::sub(V::load(s + j + L), by));
    V::store(s + j, e0), V::store(s + j + L, e1);
    sum0 = V::add(sum0, e0), sum1 = V::add(sum1, e1);
  }
  V::store(lanes, V::add(sum0, sum1));
  float total = 0.f;
  for (float lane : lanes) total += lane;
  const float factor = *top == kNone ? 0.f : std::exp2(*top - shift);
  *top = highest;
  *sum = *sum * factor + total;
  return factor;
}

// Rows of `depth` values -> [depth][panel] with one column a row; missing rows are 0.
template <typename V>
void pack_keys(const float* k, int64_t ld, int64_t rows, int64_t depth, float* to) {
  constexpr int64_t P = 2 * V::kLanes, B = V::kBlock;
  for (int64_t j = 0; j < P; j += B) {
    int64_t c = 0;
    if (j + B <= rows)
      for (; c + B <= depth; c += B) V::transpose(k + j * ld + c, ld, to + c * P + j, P);
    for (; c < depth; c++)
      for (int64_t i = j; i < j + B; i++) to[c * P + i] = i < rows ? k[i * ld + c] : 0.f;
  }
}

// scores[j] = sum_c q[c] k[j][c], four keys at a time: scores has room for a multiple of four.
template <typename V>
void dot_rows(const float* q, const float* k, int64_t ld, int64_t rows, int64_t depth, float* scores) {
  constexpr int64_t L = V::kLanes;
  for (int64_t j = 0; j < rows; j += 4) {
    const float* row[4];
    for (int64_t r = 0; r < 4; r++) row[r] = k + std::min(j + r, rows - 1) * ld;
    V a = V::set1(0.f), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + L <= depth; i += L) {
      const V x = V::load(q + i);
      a = V::fma(x, V::load(row[0] + i), a), b = V::fma(x, V::load(row[1] + i), b);
      c = V::fma(x, V::load(row[2] + i), c), d = V::fma(x, V::load(row[3] + i), d);
    }
    if (i < depth) {
      const int64_t left = depth - i;
      const V x = V::load_part(q + i, left);
      a = V::fma(x, V::load_part(row[0] + i, left), a), b = V::fma(x, V::load_part(row[1] + i, left), b);
      c = V::fma(x, V::load_part(row[2] + i, left), c), d = V::fma(x, V::load_part(row[3] + i, left), d);
    }
    V::sum4(a, b, c, d, scores + j);
  }
}

// out[c] = sum_j p[j] v[j][c]; eight sums at once hide the latency of one.
template <typename V>
void mix_rows(const float* p, const float* v, int64_t ld, int64_t rows, int64_t depth, float* out) {
  constexpr int64_t L = V::kLanes;
  int64_t c = 0;
  for (; c + 4 * L <= depth; c += 4 * L) {
    V a = V::set1(0.f), b = a, d = a, e = a, f = a, g = a, h = a, i = a;
    int64_t j = 0;
    for (; j + 2 <= rows; j += 2) {
      const float *even = v + j * ld + c, *odd = even + ld;
      const V s = V::set1(p[j]), t = V::set1(p[j + 1]);
      a = V::fma(s, V::load(even), a), b = V::fma(s, V::load(even + L), b);
      d = V::fma(s, V::load(even + 2 * L), d), e = V::fma(s, V::load(even + 3 * L), e);
      f = V::fma(t, V::load(odd), f), g = V::fma(t, V::load(odd + L), g);
      h = V::fma(t, V::load(odd + 2 * L), h), i = V::fma(t, V::load(odd + 3 * L), i);
    }
    if (j < rows) {
      const float* last = v + j * ld + c;
      const V s = V::set1(p[j]);
      a = V::fma(s, V::load(last), a), b = V::fma(s, V::load(last + L), b);
      d = V::fma(s, V::load(last + 2 * L), d), e = V::fma(s, V::load(last + 3 * L), e);
    }
    V::store(out + c, V::add(a, f)), V::store(out + c + L, V::add(b, g));
    V::store(out + c + 2 * L, V::add(d, h)), V::store(out + c + 3 * L, V::add(e, i));
  }
  for (; c < depth; c += L) {
    const int64_t left = std::min(L, depth - c);
    V a = V::set1(0.f), b = a;
    int64_t j = 0;
    for (; j + 2 <= rows; j += 2) {
      a = V::fma(V::set1(p[j]), V::load_part(v + j * ld + c, left), a);
      b = V::fma(V::set1(p[j + 1]), V::load_part(v + (j + 1) * ld + c, left), b);
    }
    if (j < rows) a = V::fma(V::set1(p[j]), V::load_part(v + j * ld + c, left), a);
    V::store_part(out + c, V::add(a, b), left);
  }
}

}  // namespace fxquant::attention
