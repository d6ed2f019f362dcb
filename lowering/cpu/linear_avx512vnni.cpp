// AVX512-VNNI: one 64-byte step of a panel is one vector; vpdpbusd is exact for every scheme.
#include "layout.h"
#include "rows.h"
#include "simd.h"

#include <algorithm>
#include <cstring>

namespace fxquant {
namespace {

inline __mmask16 tail_mask(int64_t left) { return static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1); }

inline __m512i code16(__m512 quotient, __m512i zero, __m512i top) {
  const __m512 most = _mm512_set1_ps(kFarthest), least = _mm512_set1_ps(-kFarthest);
  const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(quotient, least), most)), zero);
  return _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), top);
}

bool extent(const float* x, int64_t k, float* lowest, float* highest) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512 low = _mm512_setzero_ps(), high = low;
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(tail_mask(k - i), x + i);
    low = _mm512_min_ps(low, v);
    high = _mm512_max_ps(high, v);
    bits = _mm512_max_epi32(bits, _mm512_and_epi32(_mm512_castps_si512(v), magnitude));
  }
  *lowest = _mm512_reduce_min_ps(low);
  *highest = _mm512_reduce_max_ps(high);
  return _mm512_reduce_max_epi32(bits) < 0x7f800000;
}

// Quotients by one step.
struct ByOne {
  __m512 step;

  __m512 operator()(const float* x, int64_t i, __mmask16 mask) {
    return _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), step);
  }
};

// Quotients by a step a channel; remembers the largest magnitude.
struct ByChannel {
  const float* steps;
  __m512i bits = _mm512_setzero_si512();

  __m512 operator()(const float* x, int64_t i, __mmask16 mask) {
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    bits = _mm512_max_epi32(bits, _mm512_and_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
    return _mm512_div_ps(v, _mm512_maskz_loadu_ps(mask, steps + i));
  }
};

template <typename Quotient>
void encode_by(Quotient& quotient, const float* x, int64_t k, int32_t qmax, int32_t zero_point, uint8_t* codes) {
  const __m512i vz = _mm512_set1_epi32(zero_point), vt = _mm512_set1_epi32(qmax);
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const __m128i bytes = _mm512_cvtepi32_epi8(code16(quotient(x, i, 0xffff), vz, vt));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  std::memset(codes + i, 0, padded_features(k) - i);
  if (i < k) {
    alignas(16) uint8_t last[16];
    const __m512 v = quotient(x, i, tail_mask(k - i));
    _mm_store_si128(reinterpret_cast<__m128i*>(last), _mm512_cvtepi32_epi8(code16(v, vz, vt)));
    std::memcpy(codes + i, last, k - i);
  }
}

void encode(const float* x, int64_t k, int32_t qmax, float scale, int32_t zero_point, uint8_t* codes) {
  ByOne quotient{_mm512_set1_ps(scale)};
  encode_by(quotient, x, k, qmax, zero_point, codes);
}

bool encode_channels(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes) {
  ByChannel quotient{steps};
  encode_by(quotient, x, k, qmax, zero_point, codes);
  return _mm512_reduce_max_epi32(quotient.bits) < 0x7f800000;
}

// Rows x 16 or 32 columns, one accumulator a row and panel. A pair of panels loads each code once for two products, so
// that the multiplier and not the load unit sets the pace.
#define ZERO(r) __m512i a##r = zero;
#define ZERO2(r) __m512i a##r = zero, b##r = zero;
#define BROADCAST(r)                            \
  int32_t four;                                 \
  std::memcpy(&four, codes + r * stride, 4);    \
  const __m512i x = _mm512_set1_epi32(four);
#define DOT(r)                                  \
  {                                             \
    BROADCAST(r)                                \
    a##r = _mm512_dpbusd_epi32(a##r, x, w0);    \
  }
#define DOT2(r)                                 \
  {                                             \
    BROADCAST(r)                                \
    a##r = _mm512_dpbusd_epi32(a##r, x, w0);    \
    b##r = _mm512_dpbusd_epi32(b##r, x, w1);    \
  }
#define STORE(r) _mm512_storeu_si512(sums + r * kPanel, a##r);
#define STORE2(r) STORE(r) _mm512_storeu_si512(next + r * kPanel, b##r);
#define PANEL(R)                                                                                         \
  void panel_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t steps, int32_t* sums) { \
    const __m512i zero = _mm512_setzero_si512();                                                         \
    FXQUANT_ROWS_##R(ZERO) for (int64_t s = 0; s < steps; s++, w += 64, codes += 4) {                    \
      const __m512i w0 = _mm512_loadu_si512(w);                                                          \
      FXQUANT_ROWS_##R(DOT)                                                                              \
    }                                                                                                    \
    FXQUANT_ROWS_##R(STORE)                                                                              \
  }                                                                                                      \
  void pair_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t steps, int32_t* sums) {  \
    const __m512i zero = _mm512_setzero_si512();                                                         \
    const uint8_t* v = w + steps * 64;                                                                   \
    int32_t* next = sums + R * kPanel;                                                                   \
    FXQUANT_ROWS_##R(ZERO2) for (int64_t s = 0; s < steps; s++, w += 64, v += 64, codes += 4) {          \
      const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(v);                              \
      FXQUANT_ROWS_##R(DOT2)                                                                             \
    }                                                                                                    \
    FXQUANT_ROWS_##R(STORE2)                                                                             \
  }
PANEL(1) PANEL(2) PANEL(3) PANEL(4) PANEL(5) PANEL(6) PANEL(7) PANEL(8) PANEL(9) PANEL(10) PANEL(11) PANEL(12)
PANEL(13) PANEL(14)

using RowsFn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int32_t*);
constexpr RowsFn kPanels[] = {panel_1, panel_2, panel_3,  panel_4,  panel_5,  panel_6,  panel_7,
                              panel_8, panel_9, panel_10, panel_11, panel_12, panel_13, panel_14};
constexpr RowsFn kPairs[] = {pair_1, pair_2, pair_3,  pair_4,  pair_5,  pair_6,  pair_7,
                             pair_8, pair_9, pair_10, pair_11, pair_12, pair_13, pair_14};

void panel(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
           int32_t* sums) {
  kPanels[rows - 1](codes, stride, packed + layout.weights + p * layout.steps * 64, layout.steps, sums);
}

void pair(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
          int32_t* sums) {
  kPairs[rows - 1](codes, stride, packed + layout.weights + p * layout.steps * 64, layout.steps, sums);
}

void finish(const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
            const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out, int64_t ldo) {
  const __mmask16 mask = tail_mask(columns);
  const __m512i sum_w = _mm512_loadu_si512(column_sums);
  const __m512 sw = _mm512_loadu_ps(scale_w);
  const __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
  for (int64_t r = 0; r < rows; r++) {
    const __m512i shift = _mm512_mullo_epi32(_mm512_set1_epi32(zero_points[r]), sum_w);
    const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(sums + r * kPanel), shift);
    __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_set1_ps(scale_x[r]), sw));
    if (bias) y = _mm512_add_ps(y, added);  // adding a zero instead would lose the sign of -0
    _mm512_mask_storeu_ps(out + r * ldo, mask, y);
  }
}

}  // namespace

const Kernels kAvx512Vnni = {extent, encode, encode_channels, panel, panel, pair, finish, kMaxRows, kMaxRows, false};

}  // namespace fxquant
