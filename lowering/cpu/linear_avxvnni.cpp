// AVX-VNNI: vpdpbusd adds four 8 x 8-bit products to a 32-bit lane, exactly, for every scheme.
#include "linear_avx2.h"
#include "rows.h"

namespace fxquant {
namespace {

inline __m256i dot(__m256i acc, __m256i x, __m256i w) {
#ifdef FXQUANT_SIMDE
  return simde_mm256_dpbusd_epi32(acc, x, w);
#else
  return _mm256_dpbusd_avx_epi32(acc, x, w);
#endif
}

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

#define ZERO(r) __m256i a##r = zero, b##r = zero;
#define DOT(r)                                                 \
  {                                                            \
    const __m256i x = broadcast4(codes + r * stride + s * 4);  \
    a##r = dot(a##r, x, w0);                                   \
    b##r = dot(b##r, x, w1);                                   \
  }
#define STORE(r) to[2 * r] = a##r, to[2 * r + 1] = b##r;
#define PANEL(R)                                                                                         \
  void panel_##R(const uint8_t* codes, int64_t stride, const uint8_t* w, int64_t steps, int32_t* sums) { \
    const __m256i zero = _mm256_setzero_si256();                                                         \
    __m256i* to = reinterpret_cast<__m256i*>(sums);                                                      \
    FXQUANT_ROWS_##R(ZERO) for (int64_t s = 0; s < steps; s++, w += 64) {                                \
      const __m256i w0 = load(w), w1 = load(w + 32);                                                     \
      FXQUANT_ROWS_##R(DOT)                                                                              \
    }                                                                                                    \
    FXQUANT_ROWS_##R(STORE)                                                                              \
  }
PANEL(1) PANEL(2) PANEL(3) PANEL(4) PANEL(5) PANEL(6)

constexpr void (*kPanels[])(const uint8_t*, int64_t, const uint8_t*, int64_t, int32_t*) = {
    panel_1, panel_2, panel_3, panel_4, panel_5, panel_6};

void panel(const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t p,
           int32_t* sums) {
  kPanels[rows - 1](codes, stride, packed + layout.weights + p * layout.steps * 64, layout.steps, sums);
}

}  // namespace

const Kernels kAvxVnni = {avx2::extent, avx2::encode, avx2::encode_channels, panel, panel, nullptr, avx2::finish, 6, 6, false};

}  // namespace fxquant
