// Decode kernels on AVX512-VNNI: one step of a panel is one vector, and vpdpbusd adds 4 products in 32 bits at once.
#include "rows.h"
#include "simd.h"
#include "stream_layout.h"

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

template <int Bits>
void row_float(const float* x, const float*, const uint8_t* w, const StreamLayout& l, float* out) {
  __m512 y = _mm512_setzero_ps();
  for (int64_t g = 0; g < l.groups; g++) {
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    const __m512 codes = Bits == 8 ? a : table<Bits == 8 ? 4 : Bits>();
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, x += 32 / Bits) {
      ahead(w);
      if constexpr (Bits == 8) {
        a = _mm512_fmadd_ps(_mm512_set1_ps(x[0]), widen(w), a);
        b = _mm512_fmadd_ps(_mm512_set1_ps(x[1]), widen(w + 16), b);
        c = _mm512_fmadd_ps(_mm512_set1_ps(x[2]), widen(w + 32), c);
        d = _mm512_fmadd_ps(_mm512_set1_ps(x[3]), widen(w + 48), d);
      } else {
        const __m512i word = _mm512_loadu_si512(w);
        constexpr int per_byte = 8 / Bits;
#pragma GCC unroll 16
        for (int i = 0; i < 32 / Bits; i += 4) {
          const auto at = [&](int f) { return _mm512_set1_ps(x[f % per_byte * 4 + f / per_byte]); };
          a = _mm512_fmadd_ps(at(i), code<Bits>(word, i, codes), a);
          b = _mm512_fmadd_ps(at(i + 1), code<Bits>(word, i + 1, codes), b);
          c = _mm512_fmadd_ps(at(i + 2), code<Bits>(word, i + 2, codes), c);
          d = _mm512_fmadd_ps(at(i + 3), code<Bits>(word, i + 3, codes), d);
        }
      }
    }
    ahead(w);
    y = _mm512_fmadd_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), _mm512_loadu_ps(w), y);
    w += l.tail;
  }
  _mm512_storeu_ps(out, y);
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

void row_integer(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 y = _mm512_setzero_ps();
  const int8_t* codes = x.codes;
  const uint8_t* w = panel;
  for (int64_t g = 0; g < l.groups; g++) {
    const Tail tail(panel, l, g);
    __m512i a = start(sums_w(tail), x.shifts[0], x.corrections[g]), b = _mm512_setzero_si512();
    for (int64_t s = l.steps_of(g); s > 0; s--, w += kStepBytes, codes += 8) {
      ahead(w);
      const __m512i v = _mm512_loadu_si512(w);
      a = _mm512_dpbusd_epi32(a, _mm512_and_si512(v, low), broadcast4(codes));
      b = _mm512_dpbusd_epi32(b, _mm512_and_si512(_mm512_srli_epi16(v, 4), low), broadcast4(codes + 4));
    }
    y = _mm512_add_ps(y, scaled(_mm512_add_epi32(a, b), x.scales[0], _mm512_loadu_ps(tail.scales)));
    ahead(w);
    w += l.tail;
  }
  _mm512_storeu_ps(out, y);
}

void unpack_float(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, float* to) {
  const __m512i mask = _mm512_set1_epi32((1 << l.bits) - 1), bias = _mm512_set1_epi32(static_cast<int32_t>(l.bias()));
  const int64_t per_byte = 8 / l.bits;
  for (int64_t s = first; s < last; s++, to += l.step_k * kPanel) {
    const uint8_t* w = panel + l.step_at(s);
    const __m512 scale = _mm512_loadu_ps(panel + l.tail_at(s / l.group_steps));
    const __m512i word = _mm512_loadu_si512(w);
    for (int64_t i = 0; i < l.step_k; i++) {
      const int64_t k = i % per_byte * 4 + i / per_byte;
      const __m512i code = _mm512_and_si512(_mm512_srli_epi32(word, static_cast<unsigned>(i * l.bits)), mask);
      const __m512 value = l.bits == 8 ? widen(w + i * kPanel) : _mm512_cvtepi32_ps(_mm512_sub_epi32(code, bias));
      _mm512_storeu_ps(to + k * kPanel, _mm512_mul_ps(value, scale));
    }
  }
}

void unpack_bytes(const uint8_t* panel, const StreamLayout& l, int64_t first, int64_t last, uint8_t* to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t s = first; s < last; s++, to += 2 * kStepBytes) {
    const __m512i v = _mm512_loadu_si512(panel + l.step_at(s));
    _mm512_storeu_si512(to, _mm512_and_si512(v, low));
    _mm512_storeu_si512(to + kStepBytes, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
  }
}

// R rows x 16 columns, one accumulator a row.
#define LOAD_FLOAT(r) __m512 a##r = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kPanel);
#define FMA(r) a##r = _mm512_fmadd_ps(_mm512_set1_ps(x[r * ldx]), v, a##r);
#define STORE_FLOAT(r) _mm512_storeu_ps(sums + r * kPanel, a##r);
#define LOAD_INTEGER(r) __m512i a##r = first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + r * kPanel);
#define DOT(r) a##r = _mm512_dpbusd_epi32(a##r, v, broadcast4(x + r * stride));
#define STORE_INTEGER(r) _mm512_storeu_si512(sums + r * kPanel, a##r);
#define TILES(R)                                                                                                  \
  void tile_float_##R(const float* x, int64_t ldx, const float* w, int64_t k, bool first, float* sums) {          \
    FXQUANT_ROWS_##R(LOAD_FLOAT) for (; k > 0; k--, w += kPanel, x++) {                                           \
      const __m512 v = _mm512_loadu_ps(w);                                                                        \
      FXQUANT_ROWS_##R(FMA)                                                                                       \
    }                                                                                                             \
    FXQUANT_ROWS_##R(STORE_FLOAT)                                                                                 \
  }                                                                                                               \
  void tile_integer_##R(const int8_t* x, int64_t stride, const uint8_t* w, int64_t k4, bool first, int32_t* sums) { \
    FXQUANT_ROWS_##R(LOAD_INTEGER) for (; k4 > 0; k4--, w += kStepBytes, x += 4) {                                \
      const __m512i v = _mm512_loadu_si512(w);                                                                    \
      FXQUANT_ROWS_##R(DOT)                                                                                       \
    }                                                                                                             \
    FXQUANT_ROWS_##R(STORE_INTEGER)                                                                               \
  }
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12)

constexpr void (*kTileFloat[])(const float*, int64_t, const float*, int64_t, bool, float*) = {
    tile_float_1, tile_float_2, tile_float_3, tile_float_4,  tile_float_5,  tile_float_6,
    tile_float_7, tile_float_8, tile_float_9, tile_float_10, tile_float_11, tile_float_12};
constexpr void (*kTileInteger[])(const int8_t*, int64_t, const uint8_t*, int64_t, bool, int32_t*) = {
    tile_integer_1, tile_integer_2, tile_integer_3, tile_integer_4,  tile_integer_5,  tile_integer_6,
    tile_integer_7, tile_integer_8, tile_integer_9, tile_integer_10, tile_integer_11, tile_integer_12};

void tile_float(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t k, bool first, float* sums) {
  kTileFloat[rows - 1](x, ldx, w, k, first, sums);
}

void tile_integer(const int8_t* x, int64_t stride, int64_t rows, const uint8_t* w, int64_t k4, bool first, int32_t* sums) {
  kTileInteger[rows - 1](x, stride, w, k4, first, sums);
}

void fold(const int32_t* sums, const IntegerRows& x, int64_t groups, int64_t g, const Tail& tail, int64_t rows, float* out) {
  const __m512i sum_w = sums_w(tail);
  const __m512 scale = _mm512_loadu_ps(tail.scales);
  for (int64_t r = 0; r < rows; r++, sums += kPanel, out += kPanel) {
    const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(sums), start(sum_w, x.shifts[r], x.corrections[r * groups + g]));
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), scaled(sum, x.scales[r], scale)));
  }
}

}  // namespace

const StreamKernels kStreamAvx512Vnni = {{row_float<2>, row_float<4>, row_float<8>}, row_integer, unpack_float,
                                         unpack_bytes, tile_float, tile_integer, fold, 12, 12, false};

}  // namespace fxquant::stream
