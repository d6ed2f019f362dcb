// The portable look-up kernels: what every other path must equal, bit for bit.
#include "lut_layout.h"

namespace fxquant {
namespace {

void build(const uint8_t* codes, int64_t steps, uint8_t* tables) {
  for (int64_t s = 0; s < steps; s++)
    for (int64_t group = 0; group < 4; group++)
      for (int64_t i = 0; i < 16; i++) {
        int32_t sum = 0;
        for (int64_t bit = 0; bit < 4; bit++) sum += (i >> bit & 1) * codes[s * kLutStep + group * 4 + bit];
        tables[s * kLutRows * 64 + group * 16 + i] = static_cast<uint8_t>(sum);
      }
}

template <int64_t rows>
void look_up(const uint8_t* tables, const uint8_t* indices, const uint8_t*, int64_t steps, bool first, int32_t* sums) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < kPanel; c++) {
      int32_t sum = first ? 0 : sums[r * kPanel + c];
      for (int64_t s = 0; s < steps; s++)
        for (int64_t group = 0; group < 4; group++) {
          const uint8_t* table = tables + (s * kLutRows + r) * 64 + group * 16;
          const uint8_t* pair = indices + s * 64 + group / 2 * 32 + c * 2;
          const int32_t shift = group % 2 * 4;
          sum += table[pair[0] >> shift & 15] - table[pair[1] >> shift & 15];
        }
      sums[r * kPanel + c] = sum;
    }
}

#define BY_ROWS {look_up<1>, look_up<2>, look_up<3>, look_up<4>, look_up<5>, look_up<6>, look_up<7>, look_up<8>}

}  // namespace

const LutKernels kLutScalar = {build, {BY_ROWS, BY_ROWS, BY_ROWS}, 1};

}  // namespace fxquant
