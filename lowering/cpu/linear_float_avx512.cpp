// AVX-512: 12 rows x 16 columns, one accumulator a row; x is read by broadcast straight from its rows.
#include "linear_float_layout.h"
#include "rows.h"
#include "simd.h"

namespace fxquant {
namespace {

#define START(r) __m512 a##r = from ? _mm512_maskz_loadu_ps(mask, from + r * stride) : _mm512_setzero_ps();
#define MULTIPLY(r) a##r = _mm512_fmadd_ps(_mm512_set1_ps(*((r < 6 ? x : y) + (r < 6 ? r : r - 6) * ldx)), w0, a##r);
#define STORE(r) _mm512_mask_storeu_ps(out + r * ldo, mask, a##r);
#define PANEL(R)                                                                                               \
  void panel_##R(const float* x, int64_t ldx, const float* w, int64_t k, const float* bias, bool first,        \
                 int64_t columns, float* out, int64_t ldo) {                                                   \
    const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);                                        \
    const float *from = first ? bias : out, *y = x + 6 * ldx;                                                  \
    const int64_t stride = first ? 0 : ldo;                                                                    \
    FXQUANT_ROWS_##R(START) for (; k > 0; k--, w += 16, x++, y++) {                                            \
      const __m512 w0 = _mm512_loadu_ps(w);                                                                    \
      FXQUANT_ROWS_##R(MULTIPLY)                                                                               \
    }                                                                                                          \
    FXQUANT_ROWS_##R(STORE)                                                                                    \
  }
PANEL(1) PANEL(2) PANEL(3) PANEL(4) PANEL(5) PANEL(6) PANEL(7) PANEL(8) PANEL(9) PANEL(10) PANEL(11) PANEL(12)

}  // namespace

const FloatKernels kFloatAvx512 = {
    {panel_1, panel_2, panel_3, panel_4, panel_5, panel_6, panel_7, panel_8, panel_9, panel_10, panel_11, panel_12}, 12};

}  // namespace fxquant
