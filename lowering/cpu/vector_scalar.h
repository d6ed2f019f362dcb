// A vector of one number, T = float or double: the meaning of the names that the wider vectors share.
//
//   load, load_tail (missing lanes are `fill`), store, store_tail, stream (past the caches; needs alignment)
//   fma(a, b, c) = a * b + c        max, min: the second operand where either is NaN
//   split(x, m, n): e^x = m * 2^n, n integral, m about 0.7 to 1.42        scaled(m, n) = m * 2^n for n <= 0
//   exp(x): 0 from about -88 (or -104) down to -inf, +inf from 89 up, NaN for NaN        exp_below: the same for x <= 0
//   add_exp(sum, x) = sum + e^x for x <= 0, of which the terms below e^-20 may lose two bits
//   Weighted(f)(x) = f * e^x for x <= 0
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

namespace fxquant {
namespace {

template <typename T>
struct VectorScalar {
  using Number = T;
  static constexpr int64_t kWidth = 1;
  T v;

  static VectorScalar set(T x) { return {x}; }
  static VectorScalar load(const T* p) { return {*p}; }
  static VectorScalar load_tail(const T* p, int64_t count, T fill) { return {count > 0 ? *p : fill}; }
  void store(T* p) const { *p = v; }
  void store_tail(T* p, int64_t count) const {
    if (count > 0) *p = v;
  }
  void stream(T* p) const { *p = v; }
  T sum() const { return v; }
  T largest() const { return v; }

  friend VectorScalar operator+(VectorScalar a, VectorScalar b) { return {a.v + b.v}; }
  friend VectorScalar operator-(VectorScalar a, VectorScalar b) { return {a.v - b.v}; }
  friend VectorScalar operator*(VectorScalar a, VectorScalar b) { return {a.v * b.v}; }
  friend VectorScalar operator/(VectorScalar a, VectorScalar b) { return {a.v / b.v}; }
  static VectorScalar fma(VectorScalar a, VectorScalar b, VectorScalar c) { return {a.v * b.v + c.v}; }
  static VectorScalar max(VectorScalar a, VectorScalar b) { return {a.v > b.v ? a.v : b.v}; }
  static VectorScalar min(VectorScalar a, VectorScalar b) { return {a.v < b.v ? a.v : b.v}; }

  static void split(VectorScalar x, VectorScalar& m, VectorScalar& n) {
    const double whole = std::nearbyint(x.v * 1.4426950408889634);
    m.v = static_cast<T>(std::exp(x.v - whole * 0.6931471805599453));
    n.v = static_cast<T>(whole);
  }
  static VectorScalar scaled(VectorScalar m, VectorScalar n) {
    return {std::ldexp(m.v, static_cast<int>(max(n, set(-2000)).v))};  // not std::max: it keeps a NaN, which is no int
  }
  static VectorScalar exp(VectorScalar x) { return {static_cast<T>(std::exp(static_cast<double>(x.v)))}; }
  static VectorScalar exp_below(VectorScalar x) { return exp(x); }
  static VectorScalar add_exp(VectorScalar sum, VectorScalar x) { return sum + exp(x); }
  struct Weighted;
};

template <typename T>
struct VectorScalar<T>::Weighted {
  VectorScalar factor;
  explicit Weighted(T f) : factor{f} {}
  VectorScalar operator()(VectorScalar x) const { return exp(x) * factor; }
};

}  // namespace
}  // namespace fxquant
