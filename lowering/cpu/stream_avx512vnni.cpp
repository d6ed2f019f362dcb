// Decode kernels on AVX512-VNNI: one step of a panel is one vector, and vpdpbusd adds 4 products in 32 bits at once.
#include "simd.h"
#include "stream_layout.h"
#include "unroll.h"

#include <cstring>

namespace fxquant::stream {
namespace {

inline void ahead(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0); }

inline __m512i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// Codes as floats by look-up: vpermps reads the lowest 4 bits of an index, so a shift is all that a nibble needs. Pairs of
// 2-bit codes would need a table a pair: they are masked out instead.
template <int Bits>
inline __m512 code(__m512i word, int field, __m512 table) {
  const __m512i index = _mm512_srli_epi32(word, static_cast<unsigned>(field * Bits));
  return _mm512_permutexvar_ps(Bits == 2 ? _mm512_and_si512(index, _mm512_set1_epi32(3)) : index, table);
}

template <int Bits>
__m512 table() {
  alignas(64) float values[16];
  for (int i = 0; i < 16; i++) values[i] = static_cast<float>(i - (1 << (Bits - 1)));
  return _mm512_load_ps(values);
}

inline __m512 widen(const uint8_t* w) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
}

// Sums of R rows x 16 columns: kSets of each hide the latency of an FMA.
template <int R>
constexpr int kSets = R <= 2 ? 4 : 2;

// += x[r][k] times 16 weights.
template <int R>
inline __attribute__((always_inline)) void add(const float* x, int64_t stride, int field, __m512 weights, __m512* sums) {
  each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
    const int i = r * kSets<R> + field % kSets<R>;
    sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * stride]), weights, sums[i]);
  });
}

template <int Bits, int R>
inline __attribute__((always_inline)) void step_float(
    const float* x, int64_t stride, const uint8_t* w, __m512 codes, __m512* sums) {
  if constexpr (Bits == 8) {
    each(Range<4>(), [&](auto k) __attribute__((always_inline)) { add<R>(x + k, stride, k, widen(w + k * kPanel), sums); });
  } else {
    const __m512i word = _mm512_loadu_si512(w);
    constexpr int per_byte = 8 / Bits;
    each(Range<32 / Bits>(), [&](auto i) __attribute__((always_inline)) {
      add<R>(x + i % per_byte * 4 + i / per_byte, stride, i, code<Bits>(word, i, codes), sums);
    });
  }
}

template <int Bits, int R>
inline __attribute__((always_inline)) void rows_by(
    const FloatRows& x, const uint8_t* w, const StreamLayout& l, __m512 codes, float* out) {
  constexpr int sets = kSets<R>;
  __m512 y[R];
  each(Range<R>(), [&](auto r) __attribute__((always_inline)) { y[r] = _mm512_setzero_ps(); });
  const float* values = x.values;
  for (int64_t g = 0; g < l.groups; g++) {
    __m512 sums[R * sets];
    each(Range<R * sets>(), [&](auto i) __attribute__((always_inline)) { sums[i] = _mm512_setzero_ps(); });
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, values += 32 / Bits) {
      ahead(w);
      step_float<Bits, R>(values, x.stride, w, codes, sums);
    }
    ahead(w);
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      constexpr int i = r * sets;
      __m512 sum = _mm512_add_ps(sums[i], sums[i + 1]);
      if constexpr (sets == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(sums[i + 2], sums[i + 3]));
      y[r] = _mm512_fmadd_ps(sum, _mm512_loadu_ps(w), y[r]);
    });
    w += l.tail;
  }
  each(Range<R>(), [&](auto r) __attribute__((always_inline)) { _mm512_storeu_ps(out + r * kPanel, y[r]); });
}

template <int Bits, int R>
void rows_float(const FloatRows& x, const uint8_t* w, const StreamLayout& l, float* out) {
  rows_by<Bits, R>(x, w, l, table<Bits == 8 ? 4 : Bits>(), out);
}

template <int R>
void rows_table(const FloatRows& x, const uint8_t* w, const StreamLayout& l, const float* values, float* out) {
  rows_by<4, R>(x, w, l, _mm512_loadu_ps(values), out);
}

inline __m512i sums_w(const Tail& tail) {
  if (tail.is_wide) return _mm512_loadu_si512(tail.sums);
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(tail.sums)));
}

inline __m512i start(__m512i sum_w, int32_t shift, int32_t correction) {
  return _mm512_add_epi32(_mm512_set1_epi32(correction), _mm512_mullo_epi32(_mm512_set1_epi32(shift), sum_w));
}

inline __m512 scaled(__m512i sums, float scale_x, __m512 scale_w) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(_mm512_set1_ps(scale_x), scale_w));
}

template <int R>
void rows_integer(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out, int32_t* sums) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 y[R];
  each(Range<R>(), [&](auto r) __attribute__((always_inline)) { y[r] = _mm512_setzero_ps(); });
  const int8_t* codes = x.codes;
  const uint8_t* w = panel;
  for (int64_t g = 0; g < l.groups; g++) {
    const Tail tail(panel, l, g);
    const __m512i sum_w = sums_w(tail);
    const __m512 scale = _mm512_loadu_ps(tail.scales);
    __m512i a[R], b[R];
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      a[r] = start(sum_w, x.shifts[r], x.corrections[r * l.groups + g]), b[r] = _mm512_setzero_si512();
    });
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, codes += 8) {
      ahead(w);
      const __m512i v = _mm512_loadu_si512(w);
      const __m512i lower = _mm512_and_si512(v, low), upper = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
      each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
        a[r] = _mm512_dpbusd_epi32(a[r], lower, broadcast4(codes + r * x.stride));
        b[r] = _mm512_dpbusd_epi32(b[r], upper, broadcast4(codes + r * x.stride + 4));
      });
    }
    ahead(w);
    w += l.tail;
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      const __m512i sum = _mm512_add_epi32(a[r], b[r]);
      y[r] = _mm512_add_ps(y[r], scaled(sum, x.scales[r], scale));
      if (sums != nullptr) _mm512_storeu_si512(sums + (r * l.groups + g) * kPanel, sum);
    });
  }
  each(Range<R>(), [&](auto r) __attribute__((always_inline)) { _mm512_storeu_ps(out + r * kPanel, y[r]); });
}

}  // namespace

const StreamKernels kStreamAvx512Vnni = {{{rows_float<2, 1>, rows_float<2, 2>, rows_float<2, 3>, rows_float<2, 4>},
                                          {rows_float<4, 1>, rows_float<4, 2>, rows_float<4, 3>, rows_float<4, 4>},
                                          {rows_float<8, 1>, rows_float<8, 2>, rows_float<8, 3>, rows_float<8, 4>}},
                                         {rows_table<1>, rows_table<2>, rows_table<3>, rows_table<4>},
                                         {rows_integer<1>, rows_integer<2>, rows_integer<3>, rows_integer<4>}, false};

}  // namespace fxquant::stream
