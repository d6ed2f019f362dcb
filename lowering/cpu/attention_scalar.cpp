// Portable attention: plain loops that any compiler turns into what its target has.
#include "attention_kernels.h"

namespace fxquant::attention {
namespace {

struct Plain {
  static constexpr int64_t kLanes = 8, kBlock = 8;
  float v[8];

  template <typename F>
  static Plain each(F f) {
    Plain r;
    for (int i = 0; i < 8; i++) r.v[i] = f(i);
    return r;
  }
  static Plain load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, Plain a) { std::memcpy(p, a.v, sizeof a.v); }
  static Plain load_part(const float* p, int64_t n) { return each([&](int i) { return i < n ? p[i] : 0.f; }); }
  static void store_part(float* p, Plain a, int64_t n) { std::copy_n(a.v, n, p); }
  static Plain set1(float s) { return each([&](int) { return s; }); }
  static Plain add(Plain a, Plain b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static Plain sub(Plain a, Plain b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static Plain mul(Plain a, Plain b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static Plain max(Plain a, Plain b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Plain fma(Plain a, Plain b, Plain c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static Plain exponent(Plain n) {
    return each([&](int i) {
      uint32_t bits;
      std::memcpy(&bits, &n.v[i], 4);
      bits <<= 23;
      float r;
      std::memcpy(&r, &bits, 4);
      return r;
    });
  }
  static void sum4(Plain a, Plain b, Plain c, Plain d, float* to) {
    const Plain* from[] = {&a, &b, &c, &d};
    for (int r = 0; r < 4; r++) {
      const float* v = from[r]->v;
      to[r] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
  }
  static void transpose(const float* a, int64_t ld, float* to, int64_t ldt) {
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) to[j * ldt + i] = a[i * ld + j];
  }
};

FXQUANT_TILE(1) FXQUANT_TILE(2) FXQUANT_TILE(3) FXQUANT_TILE(4)
constexpr TileFn kWide[] = {wide_1<Plain>, wide_2<Plain>, wide_3<Plain>, wide_4<Plain>};
constexpr TileFn kNarrow[] = {narrow_1<Plain>, narrow_2<Plain>, narrow_3<Plain>, narrow_4<Plain>};

}  // namespace

const Kernels kScalar = {16, 4, kWide, kNarrow, softmax<Plain>, pack_keys<Plain>, dot_rows<Plain>, mix_rows<Plain>};

}  // namespace fxquant::attention
