// The float work of row programs on vectors of FXQUANT_LANES floats. Each instruction set compiles it for itself; the
// bits are the same: elementwise work does not depend on the width, sums are kept in 16 lanes (i mod 16) whatever the
// width and added in a fixed order, and multiplications and additions round separately (-ffp-contract=off).
#pragma once
#include "program_stages.h"
#include "simd.h"

#include <cmath>
#include <cstring>

namespace fxquant {
namespace {

constexpr int64_t kLanes = FXQUANT_LANES;
constexpr int64_t kSums = 16;
typedef float Vec __attribute__((vector_size(FXQUANT_LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(FXQUANT_LANES * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec all(float value) { return value - Vec{}; }
inline Vec magnitude(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
// Second operand where one is no number, and where both are zero: a NaN and a negative zero pass.
#if FXQUANT_LANES == 16
inline Vec lesser(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
inline Vec greater(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif FXQUANT_LANES == 8
inline Vec lesser(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
inline Vec greater(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline Vec lesser(Vec a, Vec b) { return a < b ? a : b; }
inline Vec greater(Vec a, Vec b) { return a > b ? a : b; }
#endif
inline Vec positive(Vec x) { return greater(Vec{}, x); }
inline Vec at_most(Vec x, float limit) { return lesser(all(limit), x); }
inline Vec power_of_two(Vec n) { return (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23); }

// Four vectors that go through a polynomial side by side: one alone would wait for every multiplication and addition.
struct Four {
  Vec a, b, c, d;
};
constexpr int64_t kFour = 4 * kLanes;
#define FXQUANT_FOUR(OP)                                                                                      \
  inline Four operator OP(Four x, Four y) { return {x.a OP y.a, x.b OP y.b, x.c OP y.c, x.d OP y.d}; }        \
  inline Four operator OP(Four x, float y) { return {x.a OP y, x.b OP y, x.c OP y, x.d OP y}; }               \
  inline Four operator OP(float x, Four y) { return {x OP y.a, x OP y.b, x OP y.c, x OP y.d}; }
FXQUANT_FOUR(+) FXQUANT_FOUR(-) FXQUANT_FOUR(*) FXQUANT_FOUR(/)
#undef FXQUANT_FOUR
inline Four operator-(Four x) { return {-x.a, -x.b, -x.c, -x.d}; }
inline Four magnitude(Four x) { return {magnitude(x.a), magnitude(x.b), magnitude(x.c), magnitude(x.d)}; }
inline Four positive(Four x) { return {positive(x.a), positive(x.b), positive(x.c), positive(x.d)}; }
inline Four at_most(Four x, float y) { return {at_most(x.a, y), at_most(x.b, y), at_most(x.c, y), at_most(x.d, y)}; }
inline Four power_of_two(Four n) { return {power_of_two(n.a), power_of_two(n.b), power_of_two(n.c), power_of_two(n.d)}; }

// Ends a step of the four: gcc would else write the whole polynomial of one vector before that of the next.
inline Vec step(Vec x) { return x; }
inline Four step(Four x) {
#ifdef __GNUC__
  asm("" : "+x"(x.a), "+x"(x.b), "+x"(x.c), "+x"(x.d));
#endif
  return x;
}

// Upper tail of the distribution, q(a) = 1 - Phi(a) for 0 <= a <= kGeluEnd, is the eighth power of a polynomial: its
// eighth root is so smooth that degree 8 suffices. Largest error of gelu(x) = max(x, 0) - |x| q(|x|) in float32 against
// float64, over max(1, |gelu(x)|): 2e-7 (erf) and 5e-7 (tanh form, whose q is 1 / (1 + exp(2 sqrt(2/pi) (a + .044715 a^3)))).
constexpr float kGeluEnd = 5.6f;
constexpr float kErf[] = {0.9170039892196655f,    -0.09145741164684296f,  -0.03192807734012604f,
                          -0.0006719556986354291f, 0.001504362327978015f,  3.4295029763597995e-05f,
                          -6.025763650541194e-05f, 7.479553005396156e-06f, -2.958819322884665e-07f};
constexpr float kTanh[] = {0.9170063138008118f,    -0.09148606657981873f,   -0.03181830421090126f,
                           -0.00076504290336743f,  0.0016309978673234582f,  9.974524436984211e-05f,
                           -0.00017889136506710202f, 4.206760786473751e-05f, -3.2761306556494674e-06f};

template <typename T>
inline T gelu(T x, const float (&c)[9]) {
  const T a = step(at_most(magnitude(x), kGeluEnd));
  T p = step(a * c[8] + c[7]);
  for (int k = 6; k >= 0; k--) p = step(p * a + c[k]);
  p = step(p * p);
  p = step(p * p);
  p = step(p * p);
  return positive(x) - a * p;
}

// exp(x) for -87 <= x <= 0 to 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
template <typename T>
inline T exponential(T x) {
  const T n = step((x * 1.44269504088896341f + 12582912.f) - 12582912.f);  // rounds to an integer
  const T r = step((x - n * 0.693359375f) - n * -2.12194440e-4f);
  T p = step(r * 1.9875691500e-4f + 1.3981999507e-3f);
  p = step(p * r + 8.3334519073e-3f);
  p = step(p * r + 4.1665795894e-2f);
  p = step(p * r + 1.6666665459e-1f);
  p = step(p * r + 5.0000001201e-1f);
  p = step((p * (r * r) + r) + 1.f);
  return p * power_of_two(n);
}

// silu(x) = max(x, 0) - |x| e / (1 + e), e = exp(-|x|): exact to 3 units in the last place.
template <typename T>
inline T silu(T x) {
  const T a = step(at_most(magnitude(x), 87.f));
  const T e = step(exponential(-a));
  return positive(x) - a * step(e / (1.f + e));
}

// y = f(a), by four vectors, by one, and what is left.
template <typename F>
inline void map(const RowOperands& o, F f) {
  for (int64_t i = 0; i < o.rows; i++) {
    const float* a = o.a + i * o.stride_a;
    float* y = o.y + i * o.stride_y;
    int64_t j = 0;
    for (; j + kFour <= o.n; j += kFour) {
      const float* x = a + j;
      const Four v = f(Four{load(x), load(x + kLanes), load(x + 2 * kLanes), load(x + 3 * kLanes)});
      store(y + j, v.a);
      store(y + j + kLanes, v.b);
      store(y + j + 2 * kLanes, v.c);
      store(y + j + 3 * kLanes, v.d);
    }
    for (; j + kLanes <= o.n; j += kLanes) store(y + j, f(load(a + j)));
    if (j == o.n) continue;
    Vec last{};
    std::memcpy(&last, a + j, (o.n - j) * sizeof(float));
    last = f(last);
    std::memcpy(y + j, &last, (o.n - j) * sizeof(float));
  }
}

template <typename F>
inline void map2(const RowOperands& o, F f) {
  for (int64_t i = 0; i < o.rows; i++) {
    const float *a = o.a + i * o.stride_a, *b = o.b + i * o.stride_b;
    float* y = o.y + i * o.stride_y;
    int64_t j = 0;
    for (; j + kLanes <= o.n; j += kLanes) store(y + j, f(load(a + j), load(b + j)));
    for (; j < o.n; j++) y[j] = f(a[j], b[j]);
  }
}

// sum over i of f(x[i]): lane i mod 16 takes x[i] in order; then lanes 8 apart are added, 4 apart, 2, 1.
template <typename F>
inline float lane_sum(const float* x, int64_t n, F f) {
  Vec sums[kSums / kLanes]{};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int64_t u = 0; u < kSums / kLanes; u++) sums[u] += f(load(x + i + u * kLanes));
  float lanes[kSums];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int64_t lane = 0; i + lane < n; lane++) lanes[lane] += f(all(x[i + lane]))[0];
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// y = (x - mean) * factor, then * weight, then + bias, where they are.
template <bool kCentred>
inline void scale_row(const RowOperands& o, const float* x, float* y, float mean, float factor) {
  for (int64_t j = 0; j < o.n; j += kLanes) {
    const int64_t left = o.n - j;
    const int64_t bytes = (left < kLanes ? left : kLanes) * static_cast<int64_t>(sizeof(float));
    const auto take = [&](const float* p) {
      if (left >= kLanes) return load(p);
      Vec v{};
      std::memcpy(&v, p, bytes);
      return v;
    };
    Vec v = take(x + j);
    if constexpr (kCentred) v = v - mean;
    v = v * factor;
    if (o.b != nullptr) v = v * take(o.b + j);
    if (o.c != nullptr) v = v + take(o.c + j);
    if (left >= kLanes)
      store(y + j, v);
    else
      std::memcpy(y + j, &v, bytes);
  }
}

void layer_norm(const RowOperands& o) {
  const float n = static_cast<float>(o.n);
  for (int64_t i = 0; i < o.rows; i++) {
    const float* x = o.a + i * o.stride_a;
    const float mean = lane_sum(x, o.n, [](Vec v) { return v; }) / n;
    const float variance = lane_sum(x, o.n, [mean](Vec v) { return (v - mean) * (v - mean); }) / n;
    scale_row<true>(o, x, o.y + i * o.stride_y, mean, 1.f / std::sqrt(variance + o.eps));
  }
}

void rms_norm(const RowOperands& o) {
  const float n = static_cast<float>(o.n);
  for (int64_t i = 0; i < o.rows; i++) {
    const float* x = o.a + i * o.stride_a;
    const float square = lane_sum(x, o.n, [](Vec v) { return v * v; }) / n;
    scale_row<false>(o, x, o.y + i * o.stride_y, 0.f, 1.f / std::sqrt(square + o.eps));
  }
}

void gelu_erf(const RowOperands& o) { map(o, [](auto x) { return gelu(x, kErf); }); }
void gelu_tanh(const RowOperands& o) { map(o, [](auto x) { return gelu(x, kTanh); }); }
void silu_rows(const RowOperands& o) { map(o, [](auto x) { return silu(x); }); }
void relu(const RowOperands& o) { map(o, [](auto x) { return positive(x); }); }
void add(const RowOperands& o) { map2(o, [](auto a, auto b) { return a + b; }); }
void mul(const RowOperands& o) { map2(o, [](auto a, auto b) { return a * b; }); }

constexpr RowFunctions kFunctions = {
    {nullptr, nullptr, layer_norm, rms_norm, gelu_erf, gelu_tanh, silu_rows, relu, add, mul, add, mul}};

}  // namespace
}  // namespace fxquant
