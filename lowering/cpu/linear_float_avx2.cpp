// AVX2 and FMA: 6 rows x 16 columns, twelve accumulators; x is read by broadcast straight from its rows.
#include "linear_float_layout.h"
#include "rows.h"
#include "simd.h"

namespace fxquant {
namespace {

inline __m256i tail_mask(int64_t left) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(left)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

#define START(r)                                                                         \
  __m256 a##r = _mm256_setzero_ps(), b##r = a##r;                                        \
  if (from) {                                                                            \
    a##r = _mm256_maskload_ps(from + r * stride, low);                                   \
    b##r = _mm256_maskload_ps(from + r * stride + 8, high);                              \
  }
#define MULTIPLY(r)                                                                      \
  {                                                                                      \
    const __m256 v = _mm256_broadcast_ss((r < 3 ? x : y) + (r < 3 ? r : r - 3) * ldx);   \
    a##r = _mm256_fmadd_ps(v, w0, a##r);                                                 \
    b##r = _mm256_fmadd_ps(v, w1, b##r);                                                 \
  }
#define STORE(r)                                                                         \
  _mm256_maskstore_ps(out + r * ldo, low, a##r);                                         \
  _mm256_maskstore_ps(out + r * ldo + 8, high, b##r);
#define PANEL(R)                                                                                               \
  void panel_##R(const float* x, int64_t ldx, const float* w, int64_t k, const float* bias, bool first,        \
                 int64_t columns, float* out, int64_t ldo) {                                                   \
    const __m256i low = tail_mask(columns), high = tail_mask(columns - 8);                                     \
    const float *from = first ? bias : out, *y = x + 3 * ldx;                                                  \
    const int64_t stride = first ? 0 : ldo;                                                                    \
    FXQUANT_ROWS_##R(START) for (; k > 0; k--, w += 16, x++, y++) {                                            \
      const __m256 w0 = _mm256_loadu_ps(w), w1 = _mm256_loadu_ps(w + 8);                                       \
      FXQUANT_ROWS_##R(MULTIPLY)                                                                               \
    }                                                                                                          \
    FXQUANT_ROWS_##R(STORE)                                                                                    \
  }
PANEL(1) PANEL(2) PANEL(3) PANEL(4) PANEL(5) PANEL(6)

}  // namespace

const FloatKernels kFloatAvx2 = {{panel_1, panel_2, panel_3, panel_4, panel_5, panel_6}, 6};

}  // namespace fxquant
