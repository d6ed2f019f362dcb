// AVX-512 look-ups: as on AVX2, two panels at a time; plain 512-bit vpshufb (AVX512-BW), nothing newer.
#include "lut_layout.h"
#include "rows.h"
#include "simd.h"

namespace fxquant {
namespace {

inline __m512i table(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __m512i pair(const uint8_t* p, const uint8_t* q) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), 1);
}

// A shuffle that puts code 4 * lane + bit where the entry's index has the bit, and zero elsewhere.
inline __m512i spread(int32_t bit) {
  alignas(64) uint8_t from[64];
  for (int32_t i = 0; i < 64; i++) from[i] = static_cast<uint8_t>(i % 16 >> bit & 1 ? i / 16 * 4 + bit : 0x80);
  return _mm512_load_si512(from);
}

void build(const uint8_t* codes, int64_t steps, uint8_t* tables) {
  const __m512i s0 = spread(0), s1 = spread(1), s2 = spread(2), s3 = spread(3);
  for (int64_t s = 0; s < steps; s++, codes += kLutStep, tables += kLutRows * 64) {
    const __m512i x = table(codes);
    const __m512i low = _mm512_add_epi8(_mm512_shuffle_epi8(x, s0), _mm512_shuffle_epi8(x, s1));
    const __m512i high = _mm512_add_epi8(_mm512_shuffle_epi8(x, s2), _mm512_shuffle_epi8(x, s3));
    _mm512_storeu_si512(tables, _mm512_add_epi8(low, high));
  }
}

// Four indices of a step; each macro below looks them up for one row and adds plus - minus to its 16-bit accumulator.
#define ENTRY(r, group) _mm512_shuffle_epi8(table(t + r * 64 + group * 16), i##group)
#define LESS(bytes) _mm512_maddubs_epi16(bytes, signs)
#define LOOK_UP_4(r)                                                                                      \
  a##r = _mm512_add_epi16(a##r, LESS(_mm512_add_epi8(_mm512_add_epi8(ENTRY(r, 0), ENTRY(r, 1)),           \
                                                     _mm512_add_epi8(ENTRY(r, 2), ENTRY(r, 3)))));
#define LOOK_UP_2(r)                                                                                      \
  a##r = _mm512_add_epi16(a##r, _mm512_add_epi16(LESS(_mm512_add_epi8(ENTRY(r, 0), ENTRY(r, 1))),         \
                                                 LESS(_mm512_add_epi8(ENTRY(r, 2), ENTRY(r, 3)))));
#define LOOK_UP_1(r)                                                                                      \
  a##r = _mm512_add_epi16(a##r, _mm512_add_epi16(LESS(ENTRY(r, 0)), LESS(ENTRY(r, 1))));                  \
  a##r = _mm512_add_epi16(a##r, _mm512_add_epi16(LESS(ENTRY(r, 2)), LESS(ENTRY(r, 3))));
#define ZERO(r) __m512i a##r = _mm512_setzero_si512();
#define WIDEN(r)                                                                                          \
  {                                                                                                       \
    int32_t *to = sums + r * kPanel, *beside = to + kLutSums;                                             \
    __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(a##r));                                    \
    __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(a##r, 1));                             \
    if (!first) low = _mm512_add_epi32(low, _mm512_loadu_si512(to));                                      \
    if (!first) high = _mm512_add_epi32(high, _mm512_loadu_si512(beside));                                \
    _mm512_storeu_si512(to, low);                                                                         \
    _mm512_storeu_si512(beside, high);                                                                    \
  }
#define KERNEL(D, R)                                                                                      \
  void look_up_##D##_##R(const uint8_t* t, const uint8_t* w, const uint8_t* v, int64_t steps, bool first, \
                         int32_t* sums) {                                                                 \
    const __m512i nibble = _mm512_set1_epi8(15), signs = _mm512_set1_epi16(-255); /* bytes 1, -1 */       \
    FXQUANT_ROWS_##R(ZERO) for (; steps > 0; steps--, t += kLutRows * 64, w += 64, v += 64) {             \
      __m512i i1 = pair(w, v), i3 = pair(w + 32, v + 32);                                                 \
      const __m512i i0 = _mm512_and_si512(i1, nibble), i2 = _mm512_and_si512(i3, nibble);                 \
      i1 = _mm512_and_si512(_mm512_srli_epi16(i1, 4), nibble);                                            \
      i3 = _mm512_and_si512(_mm512_srli_epi16(i3, 4), nibble);                                            \
      FXQUANT_ROWS_##R(LOOK_UP_##D)                                                                       \
    }                                                                                                     \
    FXQUANT_ROWS_##R(WIDEN)                                                                               \
  }
#define BY_ROWS(D) \
  KERNEL(D, 1) KERNEL(D, 2) KERNEL(D, 3) KERNEL(D, 4) KERNEL(D, 5) KERNEL(D, 6) KERNEL(D, 7) KERNEL(D, 8)
BY_ROWS(1) BY_ROWS(2) BY_ROWS(4)

#define NAMES(D)                                                                                          \
  {look_up_##D##_1, look_up_##D##_2, look_up_##D##_3, look_up_##D##_4,                                    \
   look_up_##D##_5, look_up_##D##_6, look_up_##D##_7, look_up_##D##_8}

}  // namespace

const LutKernels kLutAvx512 = {build, {NAMES(1), NAMES(2), NAMES(4)}, 2};

}  // namespace fxquant
