// Decode kernels on 256-bit vectors.
//
// Float activations: a code is masked where it stands in its 32-bit word, without a shift. What is left, code * 2^shift, is
// converted exactly, and x was multiplied by 2^-shift beforehand, so that the product is the right one. One shift by 16
// serves the upper half of the word. Integer activations: (code + 8), an unsigned nibble, meets x - 128, a signed byte, in
// vpmaddubsw; a 16-bit lane takes 8 such products of two: 8 * 2 * 15 * 128 = 30720 <= 32767.
#include "rows.h"
#include "simd.h"
#include "stream_layout.h"

#include <algorithm>
#include <cstring>
#include <utility>

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

// sum += x * code for the fields of the lower half of two words; x is already scaled down by each mask's shift.
template <int Bits, int Half, int... I>
inline void half_word(const float* x, __m256i a, __m256i b, __m256& a0, __m256& a1, __m256& b0, __m256& b1,
                      std::integer_sequence<int, I...>) {
  constexpr int fields = 16 / Bits;
  const auto one = [&](int i, __m256& sum_a, __m256& sum_b) __attribute__((always_inline)) {
    const __m256i mask = _mm256_set1_epi32(((1 << Bits) - 1) << (i * Bits));
    const __m256 v = _mm256_broadcast_ss(x + k_of<Bits>(Half * fields + i));
    sum_a = _mm256_fmadd_ps(v, _mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), sum_a);
    sum_b = _mm256_fmadd_ps(v, _mm256_cvtepi32_ps(_mm256_and_si256(b, mask)), sum_b);
  };
  (one(I, I % 2 ? a1 : a0, I % 2 ? b1 : b0), ...);
}

template <int Bits>
inline void step_float(const float* x, const uint8_t* w, __m256& a0, __m256& a1, __m256& b0, __m256& b1) {
  const std::make_integer_sequence<int, 16 / Bits> fields;
  const __m256i a = load(w), b = load(w + 32);
  half_word<Bits, 0>(x, a, b, a0, a1, b0, b1, fields);
  half_word<Bits, 1>(x, _mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16), a0, a1, b0, b1, fields);
}

inline __m256 widen(const uint8_t* w) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w))));
}

template <>
inline void step_float<8>(const float* x, const uint8_t* w, __m256& a0, __m256& a1, __m256& b0, __m256& b1) {
  const __m256 x0 = _mm256_broadcast_ss(x), x1 = _mm256_broadcast_ss(x + 1);
  const __m256 x2 = _mm256_broadcast_ss(x + 2), x3 = _mm256_broadcast_ss(x + 3);
  a0 = _mm256_fmadd_ps(x0, widen(w), a0), b0 = _mm256_fmadd_ps(x0, widen(w + 8), b0);
  a1 = _mm256_fmadd_ps(x1, widen(w + 16), a1), b1 = _mm256_fmadd_ps(x1, widen(w + 24), b1);
  a0 = _mm256_fmadd_ps(x2, widen(w + 32), a0), b0 = _mm256_fmadd_ps(x2, widen(w + 40), b0);
  a1 = _mm256_fmadd_ps(x3, widen(w + 48), a1), b1 = _mm256_fmadd_ps(x3, widen(w + 56), b1);
}

template <int Bits>
void row_float(const float* x, const float* corrections, const uint8_t* w, const StreamLayout& l, float* out) {
  __m256 y0 = _mm256_setzero_ps(), y1 = y0;
  for (int64_t g = 0; g < l.groups; g++) {
    __m256 a0 = _mm256_set1_ps(corrections[g]), b0 = a0, a1 = _mm256_setzero_ps(), b1 = a1;
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, x += 32 / Bits) {
      ahead(w);
      step_float<Bits>(x, w, a0, a1, b0, b1);
    }
    const float* scales = reinterpret_cast<const float*>(w);
    ahead(w);
    y0 = _mm256_fmadd_ps(_mm256_add_ps(a0, a1), _mm256_loadu_ps(scales), y0);
    y1 = _mm256_fmadd_ps(_mm256_add_ps(b0, b1), _mm256_loadu_ps(scales + 8), y1);
    w += l.tail;
  }
  _mm256_storeu_ps(out, y0);
  _mm256_storeu_ps(out + 8, y1);
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

void row_integer(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 y0 = _mm256_setzero_ps(), y1 = y0;
  const int8_t* codes = x.codes;
  const uint8_t* w = panel;
  for (int64_t g = 0; g < l.groups; g++) {
    const Tail tail(panel, l, g);
    __m256i a = start(sums_w(tail, 0), x.shifts[0], x.corrections[g]);
    __m256i b = start(sums_w(tail, 8), x.shifts[0], x.corrections[g]);
    for (int64_t s = l.steps_of(g); s > 0;) {
      __m256i narrow_a = _mm256_setzero_si256(), narrow_b = narrow_a;
      const int64_t count = std::min(s, kNarrow / 2);
      s -= count;
      for (int64_t i = 0; i < count; i++, w += kStepBytes, codes += 8) {
        ahead(w);
        const __m256i x0 = broadcast4(codes), x1 = broadcast4(codes + 4), v = load(w), u = load(w + 32);
        const __m256i high_v = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
        const __m256i high_u = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
        const __m256i v0 = _mm256_maddubs_epi16(_mm256_and_si256(v, low), x0), v1 = _mm256_maddubs_epi16(high_v, x1);
        const __m256i u0 = _mm256_maddubs_epi16(_mm256_and_si256(u, low), x0), u1 = _mm256_maddubs_epi16(high_u, x1);
        narrow_a = _mm256_add_epi16(narrow_a, _mm256_add_epi16(v0, v1));
        narrow_b = _mm256_add_epi16(narrow_b, _mm256_add_epi16(u0, u1));
      }
      a = _mm256_add_epi32(a, _mm256_madd_epi16(narrow_a, ones));
      b = _mm256_add_epi32(b, _mm256_madd_epi16(narrow_b, ones));
    }
    y0 = _mm256_add_ps(y0, scaled(a, x.scales[0], tail.scales));
    y1 = _mm256_add_ps(y1, scaled(b, x.scales[0], tail.scales + 8));
    ahead(w);
    w += l.tail;
  }
  _mm256_storeu_ps(out, y0);
  _mm256_storeu_ps(out + 8, y1);
}

void unpack_float(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, float* to) {
  const __m256i mask = _mm256_set1_epi32((1 << l.bits) - 1), bias = _mm256_set1_epi32(static_cast<int32_t>(l.bias()));
  const int64_t per_byte = 8 / l.bits;
  for (int64_t s = first; s < last; s++, to += l.step_k * kPanel) {
    const uint8_t* w = panel + l.step_at(s);
    const float* scales = reinterpret_cast<const float*>(panel + l.tail_at(s / l.group_steps));
    for (int64_t c = 0; c < kPanel; c += 8) {
      const __m256 scale = _mm256_loadu_ps(scales + c);
      if (l.bits == 8) {
        for (int64_t k = 0; k < 4; k++)
          _mm256_storeu_ps(to + k * kPanel + c, _mm256_mul_ps(widen(w + k * kPanel + c), scale));
        continue;
      }
      const __m256i word = load(w + c * 4);
      for (int64_t i = 0; i < l.step_k; i++) {
        const int64_t k = i % per_byte * 4 + i / per_byte;
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(word, static_cast<int>(i * l.bits)), mask);
        _mm256_storeu_ps(to + k * kPanel + c, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(code, bias)), scale));
      }
    }
  }
}

void unpack_bytes(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, uint8_t* to) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t s = first; s < last; s++, to += 2 * kStepBytes) {
    const uint8_t* w = panel + l.step_at(s);
    for (int64_t b = 0; b < kStepBytes; b += 32) {
      const __m256i v = load(w + b);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + b), _mm256_and_si256(v, low));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kStepBytes + b), _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    }
  }
}

// R rows x 16 columns of float.
#define LOAD(r)                                                   \
  __m256 a##r = first ? zero : _mm256_loadu_ps(sums + r * kPanel); \
  __m256 b##r = first ? zero : _mm256_loadu_ps(sums + r * kPanel + 8);
#define FMA(r)                                                                        \
  {                                                                                   \
    const __m256 v = _mm256_broadcast_ss((r < 3 ? low : high) + (r < 3 ? r : r - 3) * ldx); \
    a##r = _mm256_fmadd_ps(v, w0, a##r);                                              \
    b##r = _mm256_fmadd_ps(v, w1, b##r);                                              \
  }
#define STORE(r)                            \
  _mm256_storeu_ps(sums + r * kPanel, a##r); \
  _mm256_storeu_ps(sums + r * kPanel + 8, b##r);
#define TILE_FLOAT(R)                                                                             \
  void tile_float_##R(const float* x, int64_t ldx, const float* w, int64_t k, bool first, float* sums) { \
    const float *low = x, *high = x + 3 * ldx;                                                    \
    const __m256 zero = _mm256_setzero_ps();                                                      \
    FXQUANT_ROWS_##R(LOAD) for (; k > 0; k--, w += kPanel, low++, high++) {                       \
      const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);                          \
      FXQUANT_ROWS_##R(FMA)                                                                       \
    }                                                                                             \
    FXQUANT_ROWS_##R(STORE)                                                                       \
  }
TILE_FLOAT(1) TILE_FLOAT(2) TILE_FLOAT(3) TILE_FLOAT(4) TILE_FLOAT(5) TILE_FLOAT(6)

constexpr void (*kTileFloat[])(const float*, int64_t, const float*, int64_t, bool, float*) = {
    tile_float_1, tile_float_2, tile_float_3, tile_float_4, tile_float_5, tile_float_6};

void tile_float(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t k, bool first, float* sums) {
  kTileFloat[rows - 1](x, ldx, w, k, first, sums);
}

// acc += maddubs(w, x) in 16 bits; the two-instruction form keeps gcc from hoisting loads and spilling accumulators.
inline void mac16(__m256i& acc, __m256i w, __m256i x) {
#if defined(__GNUC__) && !defined(FXQUANT_SIMDE)
  __m256i t;
  asm volatile("vpmaddubsw %[x], %[w], %[t]\n\tvpaddw %[t], %[acc], %[acc]"
               : [acc] "+x"(acc), [t] "=&x"(t)
               : [w] "x"(w), [x] "x"(x));
#else
  acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
#endif
}

// R rows x 16 columns of integers, widened every kNarrow products.
#define ZERO(r) __m256i a##r = zero, b##r = zero;
#define MAC(r)                                                                          \
  {                                                                                     \
    const __m256i v = broadcast4((r < 3 ? low : high) + (r < 3 ? r : r - 3) * stride);  \
    mac16(a##r, w0, v);                                                                 \
    mac16(b##r, w1, v);                                                                 \
  }
#define WIDEN(r)                                                                                  \
  to[2 * r] = _mm256_add_epi32(first ? zero : to[2 * r], _mm256_madd_epi16(a##r, ones));           \
  to[2 * r + 1] = _mm256_add_epi32(first ? zero : to[2 * r + 1], _mm256_madd_epi16(b##r, ones));
#define TILE_INTEGER(R)                                                                                       \
  void tile_integer_##R(const int8_t* x, int64_t stride, const uint8_t* w, int64_t k4, bool first, int32_t* sums) { \
    const int8_t *low = x, *high = x + 3 * stride;                                                            \
    __m256i* to = reinterpret_cast<__m256i*>(sums);                                                           \
    while (k4 > 0) {                                                                                          \
      const __m256i zero = _mm256_setzero_si256();                                                            \
      FXQUANT_ROWS_##R(ZERO) const int64_t count = std::min(k4, kNarrow);                                     \
      for (int64_t s = count; s > 0; s--, w += kStepBytes, low += 4, high += 4) {                             \
        const __m256i w0 = load(w), w1 = load(w + 32);                                                        \
        FXQUANT_ROWS_##R(MAC)                                                                                 \
      }                                                                                                       \
      const __m256i ones = _mm256_set1_epi16(1);                                                              \
      FXQUANT_ROWS_##R(WIDEN) first = false;                                                                  \
      k4 -= count;                                                                                            \
    }                                                                                                         \
  }
TILE_INTEGER(1) TILE_INTEGER(2) TILE_INTEGER(3) TILE_INTEGER(4) TILE_INTEGER(5) TILE_INTEGER(6)

constexpr void (*kTileInteger[])(const int8_t*, int64_t, const uint8_t*, int64_t, bool, int32_t*) = {
    tile_integer_1, tile_integer_2, tile_integer_3, tile_integer_4, tile_integer_5, tile_integer_6};

void tile_integer(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* w, int64_t k4, bool first, int32_t* sums) {
  kTileInteger[rows - 1](x, stride, w, k4, first, sums);
}

void fold(const int32_t* sums, const IntegerRows& x, int64_t groups, int64_t g, const Tail& tail, int64_t rows, float* out) {
  for (int64_t c = 0; c < kPanel; c += 8) {
    const __m256i sum_w = sums_w(tail, c);
    for (int64_t r = 0; r < rows; r++) {
      const __m256i sum = _mm256_add_epi32(load(sums + r * kPanel + c), start(sum_w, x.shifts[r], x.corrections[r * groups + g]));
      float* to = out + r * kPanel + c;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), scaled(sum, x.scales[r], tail.scales + c)));
    }
  }
}

}  // namespace

const StreamKernels kStreamAvx2 = {{row_float<2>, row_float<4>, row_float<8>}, row_integer, unpack_float, unpack_bytes,
                                   tile_float, tile_integer, fold, 6, 6, true};

}  // namespace fxquant::stream
