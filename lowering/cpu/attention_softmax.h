// Scores in base 2 become weights: exp2, masks and the softmax of a strip of rows, as templates over a vector type (which
// attention_kernels.h describes).
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fxquant::attention {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

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
  static Four exponent(Four n) { return {V::exponent(n.a), V::exponent(n.b), V::exponent(n.c), V::exponent(n.d)}; }

 private:
  static constexpr int64_t L = V::kLanes;
};

// The highest of `count` scores in every lane; scores from there to the end of the vector become hidden ones.
template <typename V>
inline V highest(float* s, int64_t count) {
  constexpr int64_t L = V::kLanes;
  Four<V> high = Four<V>::set1(kHidden);
  int64_t j = 0;
  for (; j + 4 * L <= count; j += 4 * L) high = Four<V>::max(high, Four<V>::load(s + j));
  for (; j + L <= count; j += L) high.a = V::max(high.a, V::load(s + j));
  if (j < count) {
    const V last = V::first_or(V::load(s + j), count - j, V::set1(kHidden));
    V::store(s + j, last);
    high.b = V::max(high.b, last);
  }
  return V::highest(V::max(V::max(high.a, high.b), V::max(high.c, high.d)));
}

// s -> 2^(s - shift) for whole vectors; returns the sum.
template <typename V>
inline float weigh(float* s, int64_t padded, V shift) {
  constexpr int64_t L = V::kLanes;
  V sum = V::set1(0.f);
  int64_t j = 0;
  for (; j + 4 * L <= padded; j += 4 * L) {
    const Four<V> e = exp2(Four<V>::sub(Four<V>::load(s + j), Four<V>::all(shift)));
    Four<V>::store(s + j, e);
    sum = V::add(sum, V::add(V::add(e.a, e.b), V::add(e.c, e.d)));
  }
  for (; j < padded; j += L) {
    const V e = exp2(V::sub(V::load(s + j), shift));
    V::store(s + j, e);
    sum = V::add(sum, e);
  }
  return V::sum(sum);
}

// A strip of scores becomes weights: row r keeps its first own[r] keys, the others up to `used` get weight 0. top and sum
// hold each row's largest score and sum so far; factor is what the row's earlier output must be scaled by.
template <typename V>
void softmax(float* s, int64_t ld, int64_t rows, const int64_t* own, int64_t used, float* top, float* sum, float* factor) {
  constexpr int64_t L = V::kLanes;
  for (int64_t r = 0; r < rows; r++) {  // the maxima first: their latency hides behind each other
    const float before = top[r];
    top[r] = V::front(V::max(highest<V>(s + r * ld, own[r]), V::set1(before)));
    factor[r] = before;
  }
  for (int64_t r = 0; r < rows; r++) {
    const float shift = std::max(top[r], -FLT_MAX);  // a row with every key masked so far has weights 0
    const int64_t padded = (own[r] + L - 1) / L * L;
    const float total = weigh<V>(s + r * ld, padded, V::set1(shift));
    for (int64_t j = padded; j < used; j += L) V::store(s + r * ld + j, V::set1(0.f));
    factor[r] = factor[r] == kHidden ? 0.f : std::exp2(factor[r] - shift);
    sum[r] = sum[r] * factor[r] + total;
  }
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
