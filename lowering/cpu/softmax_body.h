// The softmax kernels over vectors V; each instruction set's file makes its table of them.
#pragma once
#include "softmax_kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fxquant {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class V>
float row_max(const float* x, int64_t n) {
  constexpr int64_t W = V::kWidth;
  V a = V::set(-kInf), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = V::max(a, V::load(x + i));
    b = V::max(b, V::load(x + i + W));
    c = V::max(c, V::load(x + i + 2 * W));
    d = V::max(d, V::load(x + i + 3 * W));
  }
  for (; i < n; i += W) a = V::max(a, V::load_tail(x + i, n - i, -kInf));
  return V::max(V::max(a, b), V::max(c, d)).largest();
}

// sum_i e^(x_i - top) in float32: for one block.
template <class V>
float sum_exp(const float* x, int64_t n, float top) {
  constexpr int64_t W = V::kWidth;
  const V shift = V::set(top);
  V a = V::set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a = V::add_exp(a, V::load(x + i) - shift);
    b = V::add_exp(b, V::load(x + i + W) - shift);
  }
  for (; i < n; i += W) a = V::add_exp(a, V::load_tail(x + i, n - i, -kInf) - shift);
  return (a + b).sum();
}

// The same, and the terms go to y.
template <class V>
float store_exp(const float* x, float* y, int64_t n, float top) {
  constexpr int64_t W = V::kWidth;
  const V shift = V::set(top);
  V a = V::set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const V p = V::exp_below(V::load(x + i) - shift), q = V::exp_below(V::load(x + i + W) - shift);
    p.store(y + i);
    q.store(y + i + W);
    a = a + p;
    b = b + q;
  }
  for (; i < n; i += W) {
    const V p = V::exp_below(V::load_tail(x + i, n - i, -kInf) - shift);
    p.store_tail(y + i, n - i);
    a = a + p;
  }
  return (a + b).sum();
}

template <class V>
void three_pass(const float* x, float* y, int64_t n) {
  constexpr int64_t W = V::kWidth;
  const float top = row_max<V>(x, n);
  double sum = 0;
  for (int64_t i = 0; i < n; i += kSoftmaxBlock)
    sum += store_exp<V>(x + i, y + i, std::min(kSoftmaxBlock, n - i), top);
  // All -inf: every term was NaN, or (in a tail) is 0 / 0.
  const V factor = V::set(static_cast<float>(1.0 / sum));
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    (V::load(y + i) * factor).store(y + i);
    (V::load(y + i + W) * factor).store(y + i + W);
  }
  for (; i < n; i += W) (V::load_tail(y + i, n - i, 0.0f) * factor).store_tail(y + i, n - i);
}

// Two blocks' worth of reads, one from memory: the block stays in the first-level cache between them.
template <class V>
SoftmaxSum sum_block(const float* x, int64_t n) {
  const float top = row_max<V>(x, n);
  // A block of -inf adds 0; relative to -inf it would be NaN. A NaN in it still gives NaN.
  return {sum_exp<V>(x, n, top == -kInf ? 0.0f : top), top};
}

// Below it e^x is as good as 0 beside any sum that this form accepts; -inf has no mantissa.
constexpr float kLowest = -1e5f;

template <class V>
inline void add_pair(V x, V& sum, V& top) {
  V m, n;
  V::split(V::max(V::set(kLowest), x), m, n);
  const V larger = V::max(n, top);
  sum = V::fma(m, V::scaled(V::set(1.0f), n - larger), V::scaled(sum, top - larger));
  top = larger;
}

template <class V>
SoftmaxSum sum_pairs(const float* x, int64_t n) {
  constexpr int64_t W = V::kWidth, kStretch = 256 * W;  // 64 terms a lane in float32
  double total = 0, highest = -1e30;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = std::min(n, begin + kStretch);
    V a = V::set(0.0f), b = a, c = a, d = a;
    V p = V::set(-1e30f), q = p, r = p, s = p;
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W) {
      add_pair(V::load(x + i), a, p);
      add_pair(V::load(x + i + W), b, q);
      add_pair(V::load(x + i + 2 * W), c, r);
      add_pair(V::load(x + i + 3 * W), d, s);
    }
    for (; i < end; i += W) add_pair(V::load_tail(x + i, end - i, -kInf), a, p);
    const float top = V::max(V::max(p, q), V::max(r, s)).largest();
    const V shift = V::set(top);
    const V sum = (V::scaled(a, p - shift) + V::scaled(b, q - shift)) + (V::scaled(c, r - shift) + V::scaled(d, s - shift));
    const double larger = std::max(highest, static_cast<double>(top));
    total = total * std::exp2(highest - larger) + sum.sum() * std::exp2(top - larger);
    highest = larger;
  }
  return {total, highest};
}

// y_i = value(x_i): whole vectors, past the caches where asked; up to an aligned place and at the end by masks.
template <class V, class Value>
inline void write(const float* x, float* y, int64_t n, bool stream, Value value) {
  constexpr int64_t W = V::kWidth;
  constexpr int64_t kBytes = W * sizeof(float);
  const int64_t past = reinterpret_cast<uintptr_t>(y) % kBytes;
  int64_t i = 0;
  if (stream && past != 0) {
    i = std::min(n, static_cast<int64_t>((kBytes - past) / sizeof(float)));
    value(V::load_tail(x, i, 0.0f)).store_tail(y, i);
  }
  if (stream)
    for (; i + 2 * W <= n; i += 2 * W) {
      const V a = value(V::load(x + i)), b = value(V::load(x + i + W));
      a.stream(y + i);
      b.stream(y + i + W);
    }
  else
    for (; i + 2 * W <= n; i += 2 * W) {
      const V a = value(V::load(x + i)), b = value(V::load(x + i + W));
      a.store(y + i);
      b.store(y + i + W);
    }
  for (; i < n; i += W) value(V::load_tail(x + i, n - i, 0.0f)).store_tail(y + i, n - i);
}

template <class V>
void write_pairs(const float* x, float* y, int64_t n, float top, float factor) {
  const V lowest = V::set(kLowest), shift = V::set(top), f = V::set(factor);
  write<V>(x, y, n, true, [=](V v) {
    V mantissa, exponent;
    V::split(V::max(lowest, v), mantissa, exponent);
    return V::scaled(mantissa * f, exponent - shift);
  });
}

template <class V>
void write_block(const float* x, float* y, int64_t n, float top, float factor, bool stream) {
  const V shift = V::set(top);
  const typename V::Weighted weighted(factor);
  write<V>(x, y, n, stream, [=](V v) { return weighted(v - shift); });
}

template <class V>
void write_log(const float* x, float* y, int64_t n, float top, float factor, bool stream) {
  const V shift = V::set(top), f = V::set(factor);
  write<V>(x, y, n, stream, [=](V v) { return (v - shift) - f; });
}

template <class V>
void exp_of(const float* x, float* y, int64_t n) {
  write<V>(x, y, n, false, [](V v) { return V::exp(v); });
}

template <class V>
constexpr SoftmaxKernels softmax_kernels() {
  return {three_pass<V>, sum_pairs<V>, sum_block<V>, write_pairs<V>, write_block<V>, write_log<V>, exp_of<V>};
}

}  // namespace
}  // namespace fxquant
