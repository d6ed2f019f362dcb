// The float attention kernels as templates over a vector type; each instruction set's file instantiates them.
//
// A vector type has kLanes, load, store, load_part, store_part (the first n lanes), set1, add, sub, mul, max (the second
// operand where one is NaN), fma, eighths (2^(n/8 - 127) of the low bits n), front (the first lane), first_or (the first n
// lanes, the others of another vector), highest (of all lanes, in every lane), sum (of all lanes), hidden (minus infinity
// where a float is minus infinity or a byte is 0, else 0), sum4 (of the lanes of four vectors) and transpose (a kBlock x
// kBlock square, times a factor).
#pragma once
#include "attention_softmax.h"
#include "attention_table.h"
#include "rows.h"

#include <algorithm>
#include <cstring>

namespace fxquant::attention {

// y[r][0..columns) (+)= sum_i x[r][i] w[i][0..columns) for R rows, times by[r] where by is given. w stands in panels of two
// vectors of columns, `panel` floats apart; y has room for whole vectors. Unrolled: short loops end as predicted. After each
// panel one panel of another strip is weighed, so that its long chains of additions run beside the multiplications.
#define FXQUANT_DECLARE2(r) V a##r = V::set1(0.f), b##r = a##r;
#define FXQUANT_START2(r) a##r = V::load(y + r * ldy), b##r = V::load(y + r * ldy + V::kLanes);
#define FXQUANT_MAC2(r)                      \
  {                                          \
    const V s = V::set1(x[r * ldx + i]);     \
    a##r = V::fma(s, w0, a##r), b##r = V::fma(s, w1, b##r); \
  }
#define FXQUANT_SCALE2(r)              \
  {                                    \
    const V s = V::set1(by[r]);        \
    a##r = V::mul(s, a##r), b##r = V::mul(s, b##r); \
  }
#define FXQUANT_STORE2(r) V::store(y + r * ldy, a##r), V::store(y + r * ldy + V::kLanes, b##r);
#define FXQUANT_DECLARE1(r) V a##r = V::set1(0.f);
#define FXQUANT_START1(r) a##r = V::load(y + r * ldy);
#define FXQUANT_MAC1(r) a##r = V::fma(V::set1(x[r * ldx + i]), w0, a##r);
#define FXQUANT_SCALE1(r) a##r = V::mul(V::set1(by[r]), a##r);
#define FXQUANT_STORE1(r) V::store(y + r * ldy, a##r);
#define FXQUANT_PRODUCT(R)                                                                                           \
  template <typename V>                                                                                              \
  void product_##R(const float* x, int64_t ldx, const float* from, int64_t panel, int64_t columns, int64_t count,    \
                   float* y, int64_t ldy, bool first, const float* by, Weights* beside) {                            \
    constexpr int64_t L = V::kLanes;                                                                                 \
    for (; columns > L; columns -= 2 * L, from += panel, y += 2 * L) {                                               \
      const float* w = from;                                                                                         \
      FXQUANT_ROWS_##R(FXQUANT_DECLARE2) if (!first) { FXQUANT_ROWS_##R(FXQUANT_START2) }                            \
      _Pragma("GCC unroll 4") for (int64_t i = 0; i < count; i++, w += 2 * L) {                                      \
        const V w0 = V::load(w), w1 = V::load(w + L);                                                                \
        FXQUANT_ROWS_##R(FXQUANT_MAC2)                                                                               \
      }                                                                                                              \
      if (by != nullptr) { FXQUANT_ROWS_##R(FXQUANT_SCALE2) }                                                        \
      FXQUANT_ROWS_##R(FXQUANT_STORE2)                                                                               \
      if (beside != nullptr) weigh_panel<V>(*beside);                                                                \
    }                                                                                                                \
    if (columns <= 0) return;                                                                                        \
    FXQUANT_ROWS_##R(FXQUANT_DECLARE1) if (!first) { FXQUANT_ROWS_##R(FXQUANT_START1) }                              \
    _Pragma("GCC unroll 4") for (int64_t i = 0; i < count; i++, from += 2 * L) {                                     \
      const V w0 = V::load(from);                                                                                    \
      FXQUANT_ROWS_##R(FXQUANT_MAC1)                                                                                 \
    }                                                                                                                \
    if (by != nullptr) { FXQUANT_ROWS_##R(FXQUANT_SCALE1) }                                                          \
    FXQUANT_ROWS_##R(FXQUANT_STORE1)                                                                                 \
  }

// Rows of `depth` values, times `factor` -> [depth][panel] with one column a row; missing rows are 0.
template <typename V>
void pack_keys(const float* k, int64_t ld, int64_t rows, int64_t depth, float factor, float* to) {
  constexpr int64_t P = 2 * V::kLanes, B = V::kBlock;
  for (int64_t j = 0; j < P; j += B) {
    int64_t c = 0;
    if (j + B <= rows)
      for (; c + B <= depth; c += B) V::transpose(k + j * ld + c, ld, factor, to + c * P + j, P);
    for (; c < depth; c++)
      for (int64_t i = j; i < j + B; i++) to[c * P + i] = i < rows ? k[i * ld + c] * factor : 0.f;
  }
}

// Rows of `depth` values -> panels [rows][two vectors] of columns, `panel` floats apart; missing columns are 0.
template <typename V>
void pack_values(const float* v, int64_t ld, int64_t rows, int64_t depth, float* to, int64_t panel) {
  constexpr int64_t L = V::kLanes;
  for (int64_t j = 0; j < rows; j++, v += ld, to += 2 * L) {
    int64_t c = 0;
    float* at = to;
    for (; c + 2 * L <= depth; c += 2 * L, at += panel) V::store(at, V::load(v + c)), V::store(at + L, V::load(v + c + L));
    if (c == depth) continue;
    const int64_t left = depth - c, low = std::min(left, L);
    V::store(at, V::load_part(v + c, low)), V::store(at + L, V::load_part(v + c + low, left - low));
  }
}

// scores[j] = sum_c q[c] k[j][c] for eight rows of keys.
template <typename V>
void dot_eight(const float* q, const float* const* k, int64_t depth, float* scores) {
  constexpr int64_t L = V::kLanes;
  V a = V::set1(0.f), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  int64_t i = 0;
  for (; i + L <= depth; i += L) {
    const V x = V::load(q + i);
    a = V::fma(x, V::load(k[0] + i), a), b = V::fma(x, V::load(k[1] + i), b);
    c = V::fma(x, V::load(k[2] + i), c), d = V::fma(x, V::load(k[3] + i), d);
    e = V::fma(x, V::load(k[4] + i), e), f = V::fma(x, V::load(k[5] + i), f);
    g = V::fma(x, V::load(k[6] + i), g), h = V::fma(x, V::load(k[7] + i), h);
  }
  if (i < depth) {
    const int64_t left = depth - i;
    const V x = V::load_part(q + i, left);
    a = V::fma(x, V::load_part(k[0] + i, left), a), b = V::fma(x, V::load_part(k[1] + i, left), b);
    c = V::fma(x, V::load_part(k[2] + i, left), c), d = V::fma(x, V::load_part(k[3] + i, left), d);
    e = V::fma(x, V::load_part(k[4] + i, left), e), f = V::fma(x, V::load_part(k[5] + i, left), f);
    g = V::fma(x, V::load_part(k[6] + i, left), g), h = V::fma(x, V::load_part(k[7] + i, left), h);
  }
  V::sum4(a, b, c, d, scores), V::sum4(e, f, g, h, scores + 4);
}

// scores[r][j] = sum_c q[r][c] k[j][c]. Eight keys serve all rows while they are in the first-level cache; a row of scores
// has room for a multiple of eight.
template <typename V>
void dot_rows(const float* q, int64_t rows, const float* k, int64_t ld, int64_t keys, int64_t depth, float* scores,
              int64_t lds) {
  for (int64_t j = 0; j < keys; j += 8) {
    const float* row[8];
    for (int64_t i = 0; i < 8; i++) row[i] = k + std::min(j + i, keys - 1) * ld;
    for (int64_t r = 0; r < rows; r++) dot_eight<V>(q + r * depth, row, depth, scores + r * lds + j);
  }
}

// out[c] += sum_j p[j] v[j][c]; eight sums at once hide the latency of one.
template <typename V>
void mix_row(const float* p, const float* v, int64_t ld, int64_t keys, int64_t depth, float* out) {
  constexpr int64_t L = V::kLanes;
  const V zero = V::set1(0.f);
  int64_t c = 0;
  for (; c + 4 * L <= depth; c += 4 * L) {
    V a = V::load(out + c), b = V::load(out + c + L), d = V::load(out + c + 2 * L), e = V::load(out + c + 3 * L);
    V f = zero, g = zero, h = zero, i = zero;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      const float *even = v + j * ld + c, *odd = even + ld;
      const V s = V::set1(p[j]), t = V::set1(p[j + 1]);
      a = V::fma(s, V::load(even), a), b = V::fma(s, V::load(even + L), b);
      d = V::fma(s, V::load(even + 2 * L), d), e = V::fma(s, V::load(even + 3 * L), e);
      f = V::fma(t, V::load(odd), f), g = V::fma(t, V::load(odd + L), g);
      h = V::fma(t, V::load(odd + 2 * L), h), i = V::fma(t, V::load(odd + 3 * L), i);
    }
    if (j < keys) {
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
    V a = V::load_part(out + c, left), b = zero;
    int64_t j = 0;
    for (; j + 2 <= keys; j += 2) {
      a = V::fma(V::set1(p[j]), V::load_part(v + j * ld + c, left), a);
      b = V::fma(V::set1(p[j + 1]), V::load_part(v + (j + 1) * ld + c, left), b);
    }
    if (j < keys) a = V::fma(V::set1(p[j]), V::load_part(v + j * ld + c, left), a);
    V::store_part(out + c, V::add(a, b), left);
  }
}

// out[r][c] = sum_j p[r][j] v[j][c]. Sixteen keys serve all rows: values a page apart share few sets of the first-level
// cache.
template <typename V>
void mix_rows(const float* p, int64_t ldp, int64_t rows, const float* v, int64_t ld, int64_t keys, int64_t depth,
              float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r++) std::fill_n(out + r * ldo, depth, 0.f);
  const int64_t step = rows == 1 ? keys : 16;
  for (int64_t j = 0; j < keys; j += step)
    for (int64_t r = 0; r < rows; r++)
      mix_row<V>(p + r * ldp + j, v + j * ld, ld, std::min(step, keys - j), depth, out + r * ldo);
}

template <typename V>
constexpr Kernels kernels(int64_t rows, const ProductFn* product) {
  return {V::kLanes,    rows,           product,     start_weights<V>, finish_weights<V>, add_mask<V>, hide<V>,
          pack_keys<V>, pack_values<V>, dot_rows<V>, mix_rows<V>};
}

}  // namespace fxquant::attention
