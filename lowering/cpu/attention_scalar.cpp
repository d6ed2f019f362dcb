// Portable attention: plain loops that any compiler turns into what its target has.
#include "attention_kernels.h"
#include "attention_log_kernels.h"

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
  static Plain min(Plain a, Plain b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static Plain div(Plain a, Plain b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static Plain fma(Plain a, Plain b, Plain c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static Plain eighths(Plain n) {
    return each([&](int i) {
      uint32_t bits;
      std::memcpy(&bits, &n.v[i], 4);
      bits = static_cast<uint32_t>(kEighths[bits % 8]) + (bits << 20);
      float r;
      std::memcpy(&r, &bits, 4);
      return r;
    });
  }
  struct Words {
    int32_t v[8];
  };
  static Words rounded(Plain a) {
    Words r;
    for (int i = 0; i < 8; i++) r.v[i] = static_cast<int32_t>(std::nearbyint(a.v[i]));
    return r;
  }
  static void store_words(int32_t* p, Words words) { std::memcpy(p, words.v, sizeof words.v); }
  static Plain look_up_short(const float* table, Words words) {
    return each([&](int i) { return words.v[i] < kShortTable ? table[words.v[i]] : 0.f; });
  }
  static Plain look_up(const float* table, Words words) { return each([&](int i) { return table[words.v[i]]; }); }
  static float front(Plain a) { return a.v[0]; }
  static Plain first_or(Plain a, int64_t n, Plain b) { return each([&](int i) { return i < n ? a.v[i] : b.v[i]; }); }
  static Plain highest(Plain a) { return set1(*std::max_element(a.v, a.v + 8)); }
  static float sum(Plain a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
  static Plain hidden(Plain m) { return each([&](int i) { return m.v[i] == kHidden ? kHidden : 0.f; }); }
  static Plain hidden(const uint8_t* m) { return each([&](int i) { return m[i] ? 0.f : kHidden; }); }
  static void sum4(Plain a, Plain b, Plain c, Plain d, float* to) {
    const Plain* from[] = {&a, &b, &c, &d};
    for (int r = 0; r < 4; r++) {
      const float* v = from[r]->v;
      to[r] = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
    }
  }
  static void transpose(const float* a, int64_t ld, float factor, float* to, int64_t ldt) {
    for (int i = 0; i < 8; i++)
      for (int j = 0; j < 8; j++) to[j * ldt + i] = a[i * ld + j] * factor;
  }
};

FXQUANT_PRODUCT(1) FXQUANT_PRODUCT(2) FXQUANT_PRODUCT(3) FXQUANT_PRODUCT(4)
constexpr ProductFn kProducts[] = {
    product_1<Plain>, product_2<Plain>, product_3<Plain>, product_4<Plain>,
};

}  // namespace

const Kernels kScalar = kernels<Plain>(4, kProducts);
const LogKernels kLogScalar = log_kernels<Plain>();

}  // namespace fxquant::attention
