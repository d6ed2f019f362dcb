// Decode kernels on 256-bit vectors.
//
// Float activations: a code is masked where it stands in its 32-bit word, without a shift. What is left, code * 2^shift, is
// converted exactly, and x was multiplied by 2^-shift beforehand, so that the product is the right one. One shift by 16
// serves the upper half of the word. Integer activations: (code + 8), an unsigned nibble, meets x - 128, a signed byte, in
// vpmaddubsw; a 16-bit lane takes 8 such products of two: 8 * 2 * 15 * 128 = 30720 <= 32767. Codes of a table: vpermps reads
// 3 bits of an index, so each half of the table is looked up, and the code's top bit, shifted to a float's sign, picks one.
#include "simd.h"
#include "stream_layout.h"
#include "unroll.h"

#include <algorithm>
#include <cstring>

namespace fxquant::stream {
namespace {

constexpr int64_t kNarrow = 8;  // vpmaddubsw results that a 16-bit lane can add up

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline void ahead(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0); }

inline __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// k of field i of a word (its bits i * Bits and up).
template <int Bits>
constexpr int64_t k_of(int i) {
  constexpr int per_byte = 8 / Bits;
  return i % per_byte * 4 + i / per_byte;
}

inline __m256 widen(const uint8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}

// Sums of R rows x 16 columns. One or two rows have too few of them to hide the latency of an FMA: they keep two of each.
template <int R>
struct FloatSums {
  static constexpr int kSets = R <= 2 ? 2 : 1;
  __m256 a[R * kSets], b[R * kSets];

  // += x[r][k] times 8 + 8 weights.
  inline __attribute__((always_inline)) void add(const float* x, int64_t stride, int set, __m256 low, __m256 high) {
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      const int i = r * kSets + set % kSets;
      const __m256 v = _mm256_broadcast_ss(x + r * stride);
      a[i] = _mm256_fmadd_ps(v, low, a[i]);
      b[i] = _mm256_fmadd_ps(v, high, b[i]);
    });
  }
};

// One step of a panel: each field of its words is masked, and converted with what the mask leaves it shifted up.
template <int Bits, int R>
inline __attribute__((always_inline)) void step_float(const float* x, int64_t stride, const uint8_t* w, FloatSums<R>& sums) {
  if constexpr (Bits == 8) {
    each(Range<4>(), [&](auto k) __attribute__((always_inline)) {
      sums.add(x + k, stride, k, widen(w + k * kPanel), widen(w + k * kPanel + 8));
    });
    return;
  }
  each(Range<2>(), [&](auto half) __attribute__((always_inline)) {
    constexpr int fields = 16 / Bits;
    const __m256i a = half == 0 ? load(w) : _mm256_srli_epi32(load(w), 16);
    const __m256i b = half == 0 ? load(w + 32) : _mm256_srli_epi32(load(w + 32), 16);
    each(Range<fields>(), [&](auto i) __attribute__((always_inline)) {
      const __m256i mask = _mm256_set1_epi32(((1 << Bits) - 1) << (i * Bits));
      sums.add(x + k_of<Bits>(half * fields + i), stride, i, _mm256_cvtepi32_ps(_mm256_and_si256(a, mask)),
               _mm256_cvtepi32_ps(_mm256_and_si256(b, mask)));
    });
  });
}

// The values of field i of 8 words.
inline __m256 look_up(__m256i words, int i, __m256 lower, __m256 upper) {
  const __m256i index = _mm256_srli_epi32(words, 4 * i);
  const __m256 top = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * i));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index), top);
}

template <int R>
inline __attribute__((always_inline)) void step_table(
    const float* x, int64_t stride, const uint8_t* w, __m256 lower, __m256 upper, FloatSums<R>& sums) {
  const __m256i a = load(w), b = load(w + 32);
  each(Range<8>(), [&](auto i) __attribute__((always_inline)) {
    sums.add(x + k_of<4>(i), stride, i, look_up(a, i, lower, upper), look_up(b, i, lower, upper));
  });
}

// `step` adds one step of the panel to the sums.
template <int Bits, int R, typename Step>
inline __attribute__((always_inline)) void rows_by(
    const FloatRows& x, const uint8_t* w, const StreamLayout& l, float* out, Step step) {
  constexpr int kSets = FloatSums<R>::kSets;
  __m256 y[R], z[R];
  each(Range<R>(), [&](auto r) { y[r] = z[r] = _mm256_setzero_ps(); });
  const float* values = x.values;
  for (int64_t g = 0; g < l.groups; g++) {
    FloatSums<R> sums;
    each(Range<R * kSets>(), [&](auto i) __attribute__((always_inline)) {
      sums.a[i] = sums.b[i] = i % kSets ? _mm256_setzero_ps() : _mm256_set1_ps(x.corrections[i / kSets * l.groups + g]);
    });
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, values += 32 / Bits) {
      ahead(w);
      step(values, w, sums);
    }
    const __m256 low = _mm256_loadu_ps(reinterpret_cast<const float*>(w));
    const __m256 high = _mm256_loadu_ps(reinterpret_cast<const float*>(w) + 8);
    ahead(w);
    w += l.tail;
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      constexpr int first = r * kSets, last = first + kSets - 1;
      y[r] = _mm256_fmadd_ps(first == last ? sums.a[first] : _mm256_add_ps(sums.a[first], sums.a[last]), low, y[r]);
      z[r] = _mm256_fmadd_ps(first == last ? sums.b[first] : _mm256_add_ps(sums.b[first], sums.b[last]), high, z[r]);
    });
  }
  each(Range<R>(), [&](auto r) {
    _mm256_storeu_ps(out + r * kPanel, y[r]);
    _mm256_storeu_ps(out + r * kPanel + 8, z[r]);
  });
}

template <int Bits, int R>
void rows_float(const FloatRows& x, const uint8_t* w, const StreamLayout& l, float* out) {
  rows_by<Bits, R>(x, w, l, out, [&](const float* values, const uint8_t* from, FloatSums<R>& sums)
                   __attribute__((always_inline)) { step_float<Bits, R>(values, x.stride, from, sums); });
}

template <int R>
void rows_table(const FloatRows& x, const uint8_t* w, const StreamLayout& l, const float* table, float* out) {
  const __m256 lower = _mm256_loadu_ps(table), upper = _mm256_loadu_ps(table + 8);
  rows_by<4, R>(x, w, l, out, [&](const float* values, const uint8_t* from, FloatSums<R>& sums)
                __attribute__((always_inline)) { step_table<R>(values, x.stride, from, lower, upper, sums); });
}

// Columns c .. c + 7 of the sums of a group's codes.
inline __m256i sums_w(const Tail& tail, int64_t c) {
  if (tail.is_wide) return load(static_cast<const int32_t*>(tail.sums) + c);
  const void* narrow = static_cast<const int16_t*>(tail.sums) + c;
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(narrow)));
}

inline __m256 scaled(__m256i sums, float scale_x, const float* scale_w) {
  return _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(_mm256_set1_ps(scale_x), _mm256_loadu_ps(scale_w)));
}

inline __m256i start(__m256i sum_w, int32_t shift, int32_t correction) {
  return _mm256_add_epi32(_mm256_set1_epi32(correction), _mm256_mullo_epi32(_mm256_set1_epi32(shift), sum_w));
}

// R rows x 16 columns in 16 bits.
template <int R>
struct NarrowSums {
  __m256i a[R], b[R];

  // += codes[r][0 .. 3] times the lower, codes[r][4 .. 7] times the upper nibbles of a step.
  inline __attribute__((always_inline)) void add(const int8_t* codes, int64_t stride, const uint8_t* w) {
    const __m256i low = _mm256_set1_epi8(15), v = load(w), u = load(w + 32);
    const __m256i v0 = _mm256_and_si256(v, low), v1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    const __m256i u0 = _mm256_and_si256(u, low), u1 = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      const __m256i x0 = broadcast4(codes + r * stride), x1 = broadcast4(codes + r * stride + 4);
      a[r] = _mm256_add_epi16(a[r], _mm256_add_epi16(_mm256_maddubs_epi16(v0, x0), _mm256_maddubs_epi16(v1, x1)));
      b[r] = _mm256_add_epi16(b[r], _mm256_add_epi16(_mm256_maddubs_epi16(u0, x0), _mm256_maddubs_epi16(u1, x1)));
    });
  }
};

template <int R>
void rows_integer(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out, int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 y[R], z[R];
  each(Range<R>(), [&](auto r) { y[r] = z[r] = _mm256_setzero_ps(); });
  const int8_t* codes = x.codes;
  const uint8_t* w = panel;
  for (int64_t g = 0; g < l.groups; g++) {
    const Tail tail(panel, l, g);
    const __m256i sum_a = sums_w(tail, 0), sum_b = sums_w(tail, 8);
    __m256i a[R], b[R];
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      const int32_t correction = x.corrections[r * l.groups + g];
      a[r] = start(sum_a, x.shifts[r], correction), b[r] = start(sum_b, x.shifts[r], correction);
    });
    for (int64_t s = l.steps_of(g); s > 0;) {
      NarrowSums<R> narrow;
      each(Range<R>(), [&](auto r) __attribute__((always_inline)) { narrow.a[r] = narrow.b[r] = _mm256_setzero_si256(); });
      const int64_t count = std::min(s, kNarrow / 2);
      s -= count;
      for (int64_t i = 0; i < count; i++, w += kStepBytes, codes += 8) {
        ahead(w);
        narrow.add(codes, x.stride, w);
      }
      each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
        a[r] = _mm256_add_epi32(a[r], _mm256_madd_epi16(narrow.a[r], ones));
        b[r] = _mm256_add_epi32(b[r], _mm256_madd_epi16(narrow.b[r], ones));
      });
    }
    ahead(w);
    w += l.tail;
    each(Range<R>(), [&](auto r) __attribute__((always_inline)) {
      y[r] = _mm256_add_ps(y[r], scaled(a[r], x.scales[r], tail.scales));
      z[r] = _mm256_add_ps(z[r], scaled(b[r], x.scales[r], tail.scales + 8));
      if (sums == nullptr) return;
      int32_t* to = sums + (r * l.groups + g) * kPanel;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a[r]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), b[r]);
    });
  }
  each(Range<R>(), [&](auto r) {
    _mm256_storeu_ps(out + r * kPanel, y[r]);
    _mm256_storeu_ps(out + r * kPanel + 8, z[r]);
  });
}

}  // namespace

const StreamKernels kStreamAvx2 = {{{rows_float<2, 1>, rows_float<2, 2>, rows_float<2, 3>, rows_float<2, 4>},
                                    {rows_float<4, 1>, rows_float<4, 2>, rows_float<4, 3>, rows_float<4, 4>},
                                    {rows_float<8, 1>, rows_float<8, 2>, rows_float<8, 3>, rows_float<8, 4>}},
                                   {rows_table<1>, rows_table<2>, rows_table<3>, rows_table<4>},
                                   {rows_integer<1>, rows_integer<2>, rows_integer<3>, rows_integer<4>}, true};

}  // namespace fxquant::stream
