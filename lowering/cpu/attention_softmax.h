// Scores in base 2 become weights: exp2, masks and the softmax of a strip of rows, as templates over a vector type (which
// attention_kernels.h describes).
#pragma once
#include "attention_table.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fxquant::attention {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

// 2^t for t <= 0, 0 below 2^-127; at most 1.2 ulp off where the result is a normal number. Adding the magic number rounds
// t to eighths and leaves 8 (t + 127) in the low bits; a table of 2^(i/8) and a cubic for what is left (2.5e-8 relative,
// exact at 0) take fewer multiplications than a longer polynomial.
template <typename V>
inline V exp2(V t) {
  const V magic = V::set1(1572864.f + 127.f);
  t = V::max(V::set1(-127.f), t);  // NaN stays
  const V n = V::add(t, magic);
  const V f = V::sub(t, V::sub(n, magic)), scale = V::eighths(n);
  const V p = V::fma(V::fma(V::set1(0x1.c6a004p-5f), f, V::set1(0x1.ec0c32p-3f)), f, V::set1(0x1.62e432p-1f));
  return V::fma(V::mul(p, f), scale, scale);
}

// The bits of 2^(i/8) less i << 20: adding the low bits of 8 n + i, shifted left by 20, makes 2^(n + i/8). Twice, as some
// look-ups use four bits.
alignas(64) constexpr int32_t kEighths[16] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865,
                                              0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};

// Four vectors in lockstep. One exp2 is a chain of some 40 cycles: as the scheduler holds only a few such chains, four
// must advance side by side in the instruction stream to keep the multipliers busy.
template <typename V>
struct Four {
  V a, b, c, d;

  static Four load(const float* p) { return {V::load(p), V::load(p + L), V::load(p + 2 * L), V::load(p + 3 * L)}; }
  static void store(float* p, Four x) {
    V::store(p, x.a), V::store(p + L, x.b), V::store(p + 2 * L, x.c), V::store(p + 3 * L, x.d);
  }
  static Four set1(float s) { return all(V::set1(s)); }
  static Four all(V x) { return {x, x, x, x}; }
  static Four add(Four x, Four y) { return {V::add(x.a, y.a), V::add(x.b, y.b), V::add(x.c, y.c), V::add(x.d, y.d)}; }
  static Four sub(Four x, Four y) { return {V::sub(x.a, y.a), V::sub(x.b, y.b), V::sub(x.c, y.c), V::sub(x.d, y.d)}; }
  static Four mul(Four x, Four y) { return {V::mul(x.a, y.a), V::mul(x.b, y.b), V::mul(x.c, y.c), V::mul(x.d, y.d)}; }
  static Four max(Four x, Four y) { return {V::max(x.a, y.a), V::max(x.b, y.b), V::max(x.c, y.c), V::max(x.d, y.d)}; }
  static Four fma(Four x, Four y, Four z) {
    return {V::fma(x.a, y.a, z.a), V::fma(x.b, y.b, z.b), V::fma(x.c, y.c, z.c), V::fma(x.d, y.d, z.d)};
  }
  static Four eighths(Four n) { return {V::eighths(n.a), V::eighths(n.b), V::eighths(n.c), V::eighths(n.d)}; }

 private:
  static constexpr int64_t L = V::kLanes;
};

// The highest of `count` scores in every lane. Scores from there to the end of `padded` become hidden ones.
template <typename V>
inline V highest(float* s, int64_t count, int64_t padded) {
  constexpr int64_t L = V::kLanes;
  Four<V> high = Four<V>::set1(kHidden);
  int64_t j = 0;
  for (; j + 4 * L <= count; j += 4 * L) high = Four<V>::max(high, Four<V>::load(s + j));
  for (; j + L <= count; j += L) high.a = V::max(high.a, V::load(s + j));
  if (j < count) {
    const V last = V::first_or(V::load(s + j), count - j, V::set1(kHidden));
    V::store(s + j, last);
    high.b = V::max(high.b, last);
    j += L;
  }
  for (; j < padded; j += L) V::store(s + j, V::set1(kHidden));
  return V::highest(V::max(V::max(high.a, high.b), V::max(high.c, high.d)));
}

// A strip of scores is about to become weights: row r has own[r] keys, the others up to `used` get weight 0. top and sum
// hold each row's largest score and the sum of its weights so far; the sum is scaled to the new largest score, as the
// row's earlier output must be by w.factor.
template <typename V>
void start_weights(Weights& w, const int64_t* own, int64_t used, float* top, float* sum) {
  constexpr int64_t L = V::kLanes;
  w.left = (used + 2 * L - 1) / (2 * L);
  for (int64_t r = 0; r < w.rows; r++) {
    const float before = top[r];
    top[r] = V::front(V::max(highest<V>(w.scores + r * w.ld, own[r], w.left * 2 * L), V::set1(before)));
    w.shift[r] = std::max(top[r], -FLT_MAX);  // a row with every key masked so far has weights 0
    w.factor[r] = before == kHidden ? 0.f : std::exp2(before - w.shift[r]);
    sum[r] *= w.factor[r];
    V::store(w.lanes + r * L, V::set1(0.f));
  }
}

// s -> 2^(s - shift) in the next panel of keys. Not inlined: a product that calls it keeps all registers to itself.
template <typename V>
__attribute__((noinline)) void weigh_panel(Weights& w) {
  constexpr int64_t L = V::kLanes;
  if (w.left == 0) return;
  float *s = w.scores, *lanes = w.lanes;
  int64_t r = 0;
  for (; r + 2 <= w.rows; r += 2, s += 2 * w.ld, lanes += 2 * L) {
    const V even = V::set1(w.shift[r]), odd = V::set1(w.shift[r + 1]);
    const Four<V> given = {V::load(s), V::load(s + L), V::load(s + w.ld), V::load(s + w.ld + L)};
    const Four<V> e = exp2(Four<V>::sub(given, {even, even, odd, odd}));
    V::store(s, e.a), V::store(s + L, e.b), V::store(s + w.ld, e.c), V::store(s + w.ld + L, e.d);
    V::store(lanes, V::add(V::load(lanes), V::add(e.a, e.b)));
    V::store(lanes + L, V::add(V::load(lanes + L), V::add(e.c, e.d)));
  }
  if (r < w.rows) {
    const V shift = V::set1(w.shift[r]), a = exp2(V::sub(V::load(s), shift)), b = exp2(V::sub(V::load(s + L), shift));
    V::store(s, a), V::store(s + L, b);
    V::store(lanes, V::add(V::load(lanes), V::add(a, b)));
  }
  w.scores += 2 * L;
  w.left--;
}

// The panels that are left, and the sums of all.
template <typename V>
void finish_weights(Weights& w, float* sum) {
  while (w.left > 0) weigh_panel<V>(w);
  for (int64_t r = 0; r < w.rows; r++) sum[r] += V::sum(V::load(w.lanes + r * V::kLanes));
}

// s[j] += log2(e) mask[j]. A finite mask stays finite, so that a row of the lowest float is uniform, not empty.
template <typename V>
void add_mask(float* s, const float* mask, int64_t step, int64_t count) {
  constexpr float kLog2E = 1.44269504f, kLowest = -0x1.62e42ep+127f;  // kLowest log2(e) is no less than the lowest float
  int64_t j = 0;
  if (step == 1)
    for (; j + V::kLanes <= count; j += V::kLanes) {
      const V m = V::load(mask + j), sum = V::fma(V::max(V::set1(kLowest), m), V::set1(kLog2E), V::load(s + j));
      V::store(s + j, V::add(sum, V::hidden(m)));
    }
  for (; j < count; j++) {
    const float m = mask[j * step];
    s[j] += m == kHidden ? kHidden : (m < kLowest ? kLowest : m) * kLog2E;
  }
}

// Keys whose byte is 0 are hidden.
template <typename V>
void hide(float* s, const uint8_t* mask, int64_t step, int64_t count) {
  int64_t j = 0;
  if (step == 1)
    for (; j + V::kLanes <= count; j += V::kLanes) V::store(s + j, V::add(V::load(s + j), V::hidden(mask + j)));
  for (; j < count; j++) s[j] += mask[j * step] ? 0.f : kHidden;
}

}  // namespace fxquant::attention
