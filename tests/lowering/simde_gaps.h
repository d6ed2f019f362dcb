// AVX-512 instructions that SIMDe does not cover, spelled out element by element.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace simde_gaps {

struct Floats {
  alignas(64) float lane[16];
  explicit Floats(__m512 v) { _mm512_store_ps(lane, v); }
  Floats() : lane() {}
};
struct Ints {
  alignas(64) int32_t lane[16];
  explicit Ints(__m512i v) { _mm512_store_si512(lane, v); }
  Ints() : lane() {}
};

inline __m512i cvtps_epi32(__m512 v) {
  const Floats from(v);
  Ints to;
  for (int i = 0; i < 16; i++) to.lane[i] = static_cast<int32_t>(std::lrintf(from.lane[i]));
  return _mm512_load_si512(to.lane);
}
inline __m512 cvtepi32_ps(__m512i v) {
  const Ints from(v);
  Floats to;
  for (int i = 0; i < 16; i++) to.lane[i] = static_cast<float>(from.lane[i]);
  return _mm512_load_ps(to.lane);
}
inline __m128i cvtepi32_epi8(__m512i v) {
  const Ints from(v);
  alignas(16) int8_t to[16];
  for (int i = 0; i < 16; i++) to[i] = static_cast<int8_t>(from.lane[i]);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(to));
}
inline __m512 maskz_loadu_ps(__mmask16 mask, const float* from) {
  Floats to;
  for (int i = 0; i < 16; i++) to.lane[i] = mask >> i & 1 ? from[i] : 0.f;
  return _mm512_load_ps(to.lane);
}
inline void mask_storeu_ps(float* to, __mmask16 mask, __m512 v) {
  const Floats from(v);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) to[i] = from.lane[i];
}
inline int32_t reduce_max_epi32(__m512i v) {
  const Ints from(v);
  return *std::max_element(from.lane, from.lane + 16);
}
inline float reduce_max_ps(__m512 v) {
  const Floats from(v);
  return *std::max_element(from.lane, from.lane + 16);
}
inline float reduce_min_ps(__m512 v) {
  const Floats from(v);
  return *std::min_element(from.lane, from.lane + 16);
}

}  // namespace simde_gaps

#define _mm512_cvtps_epi32 simde_gaps::cvtps_epi32
#define _mm512_cvtepi32_ps simde_gaps::cvtepi32_ps
#define _mm512_cvtepi32_epi8 simde_gaps::cvtepi32_epi8
#define _mm512_maskz_loadu_ps simde_gaps::maskz_loadu_ps
#define _mm512_mask_storeu_ps simde_gaps::mask_storeu_ps
#define _mm512_reduce_max_epi32 simde_gaps::reduce_max_epi32
#define _mm512_reduce_max_ps simde_gaps::reduce_max_ps
#define _mm512_reduce_min_ps simde_gaps::reduce_min_ps
