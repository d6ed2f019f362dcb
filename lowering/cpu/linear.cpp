// Picks the linear kernels of the instruction set in force and implements their C interface.
#include "isa.h"
#include "layout.h"
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

using namespace fxquant;

namespace {

constexpr const Kernels* kTable[] = {&kScalar, &kAvx2, &kAvxVnni, &kAvx512Vnni};

const Header& header_of(const uint8_t* packed) { return *reinterpret_cast<const Header*>(packed); }

// Widens codes that stand in the upper half of their row, front to back: what is overwritten has been read.
void spread(const uint8_t* narrow, int64_t count, uint8_t* row) {
  for (int64_t j = 0; j < count; j += 16) {  // count is a multiple of 32
    uint8_t from[16];
    uint16_t to[16];
    std::memcpy(from, narrow + j, 16);
    for (int64_t i = 0; i < 16; i++) to[i] = from[i];
    std::memcpy(row + 2 * j, to, 32);
  }
}

// Walks over the panels and row blocks of a tile; use(layout, sums, row, rows, column, columns) takes each block.
template <typename Use>
void walk(const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1, Use use) {
  const Header& header = header_of(packed);
  const Layout layout(header);
  const bool scheduled = has_schedule(header.weight_bits, header.act_bits);
  const Kernels& kernel = kernels();
  const PanelFn panel = scheduled ? kernel.panel_15 : kernel.panel_8x8;
  const Scratch rows(m, header.k, is_wide(header.weight_bits, header.act_bits));
  const int64_t block = even_share(m1 - m0, scheduled ? kernel.rows_15 : kernel.rows_8x8);
  alignas(64) int32_t sums[2 * kMaxRows * kPanel];
  for (int64_t n = n0; n < n1;) {
    const int64_t panels = kernel.pair && n + kPanel < n1 ? 2 : 1;
    // The next panel's weights come from the third-level cache while this one's are at work: a share with every block.
    const uint8_t* next = packed + layout.weights + (n / kPanel + panels) * layout.steps * 64;
    const int64_t share = (panels * layout.steps * block + (m1 - m0) - 1) / (m1 - m0);
    for (int64_t i = m0; i < m1; i += block) {
      const int64_t count = std::min(block, m1 - i);
      for (int64_t line = 0; line < share; line++) __builtin_prefetch(next + line * 64, 0, 2);
      next += share * 64;
      const uint8_t* codes = scratch + rows.codes + i * rows.stride;
      (panels == 2 ? kernel.pair : panel)(codes, rows.stride, count, packed, layout, n / kPanel, sums);
      for (int64_t p = 0; p < panels; p++) {
        const int64_t column = n + p * kPanel;
        use(layout, sums + p * count * kPanel, i, count, column, std::min(kPanel, n1 - column));
      }
    }
    n += panels * kPanel;
  }
}

struct Qparams {
  float scale;
  int32_t zero_point;
};

// The scale and zero point that cover a row from low <= 0 to high >= 0.
Qparams qparams_of(float low, float high, int32_t qmax) {
  const float top = static_cast<float>(qmax);
  const float scale = std::max(high / top - low / top, std::numeric_limits<float>::min());
  return {scale, std::clamp(static_cast<int32_t>(std::lrintf(-low / scale)), 0, qmax)};
}

// A row with a value that is not finite: codes 0, and a scale that makes its outputs NaN.
Qparams not_finite(int64_t k, uint8_t* codes) {
  std::memset(codes, 0, padded_features(k));
  return {std::numeric_limits<float>::quiet_NaN(), 0};
}

// Quantizes a row with its own qparams; returns them.
Qparams quantize(const float* x, int64_t k, int32_t qmax, uint8_t* codes) {
  const Kernels& kernel = kernels();
  float low, high;
  if (!kernel.extent(x, k, &low, &high)) return not_finite(k, codes);
  const Qparams used = qparams_of(low, high, qmax);
  kernel.encode(x, k, qmax, used.scale, used.zero_point, codes);
  return used;
}

// Quantizes a row with given steps. The weight holds them too: what is left of the row's scale is 1.
Qparams quantize_static(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes) {
  if (!kernels().encode_channels(x, k, qmax, steps, zero_point, codes)) return not_finite(k, codes);
  return {1.f, zero_point};
}

// Quantizes rows into the scratch memory; quantize(row, qmax, codes) makes narrow codes of each.
template <typename Quantize>
void quantize_rows(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t k, int32_t weight_bits, int32_t act_bits,
    uint8_t* scratch, int64_t m, Quantize quantize) {
  const bool wide = is_wide(weight_bits, act_bits);
  const int32_t qmax = (1 << act_bits) - 1;
  const Scratch rows(m, k, wide);
  float* scales = reinterpret_cast<float*>(scratch);
  int32_t* zero_points = reinterpret_cast<int32_t*>(scratch + rows.zero_points);
  for (int64_t i = m0; i < m1; i++) {
    const float* row = x + i * ldx;
    uint8_t* codes = scratch + rows.codes + i * rows.stride;
    uint8_t* narrow = wide ? codes + rows.stride / 2 : codes;
    const Qparams used = quantize(row, qmax, narrow);
    scales[i] = used.scale;
    zero_points[i] = used.zero_point;
    if (wide) spread(narrow, rows.stride / 2, codes);
  }
}

}  // namespace

const Kernels& fxquant::kernels() { return *kTable[fxquant_isa()]; }

void fxquant::quantize_row(
    const float* x, int64_t k, int32_t qmax, uint8_t* codes, float* scale, int32_t* zero_point) {
  const Qparams used = quantize(x, k, qmax, codes);
  *scale = used.scale;
  *zero_point = used.zero_point;
}

bool fxquant::is_wide(int32_t weight_bits, int32_t act_bits) {
  return !has_schedule(weight_bits, act_bits) && kernels().wide_8x8;
}

extern "C" void fxquant_linear_tiles(
    int64_t m, int64_t n, int32_t weight_bits, int32_t act_bits, int64_t threads, int64_t* rows, int64_t* columns) {
  constexpr int64_t kTilesPerThread = 4;  // so that the threads finish together
  const int64_t step = has_schedule(weight_bits, act_bits) ? kernels().rows_15 : kernels().rows_8x8;
  const int64_t share = even_share(std::max<int64_t>(m, 1), FXQUANT_TILE_ROWS);
  *rows = std::min<int64_t>((share + step - 1) / step * step, FXQUANT_TILE_ROWS);
  *columns = FXQUANT_TILE_COLUMNS;
  const auto count = [&] { return ((m + *rows - 1) / *rows) * ((n + *columns - 1) / *columns); };
  while (*columns > kPanel && count() < threads * kTilesPerThread) *columns /= 2;  // pairs of panels stay whole
}

extern "C" int64_t fxquant_linear_scratch_bytes(int64_t m, int64_t k, int32_t weight_bits, int32_t act_bits) {
  return Scratch(m, k, is_wide(weight_bits, act_bits)).bytes;
}

extern "C" void fxquant_quantize_rows(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t k, int32_t weight_bits, int32_t act_bits,
    uint8_t* scratch, int64_t m) {
  quantize_rows(x, ldx, m0, m1, k, weight_bits, act_bits, scratch, m,
                [k](const float* row, int32_t qmax, uint8_t* codes) { return quantize(row, k, qmax, codes); });
}

extern "C" void fxquant_quantize_rows_static(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t k, int32_t weight_bits, int32_t act_bits,
    const float* steps, const int32_t* zero_point, uint8_t* scratch, int64_t m) {
  quantize_rows(x, ldx, m0, m1, k, weight_bits, act_bits, scratch, m,
                [k, steps, zero = *zero_point](const float* row, int32_t qmax, uint8_t* codes) {
                  return quantize_static(row, k, qmax, steps, zero, codes);
                });
}

extern "C" void fxquant_linear_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    float* out, int64_t ldo) {
  fxquant_linear_bias_tile(scratch, m, packed, nullptr, m0, m1, n0, n1, out, ldo);
}

extern "C" void fxquant_linear_bias_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, const float* bias, int64_t m0, int64_t m1, int64_t n0,
    int64_t n1, float* out, int64_t ldo) {
  if (m0 >= m1) return;
  const float* scale_x = reinterpret_cast<const float*>(scratch);
  const int32_t* zero_points = reinterpret_cast<const int32_t*>(scratch + align64(m * 4));
  const FinishFn finish = kernels().finish;
  walk(scratch, m, packed, m0, m1, n0, n1,
       [&](const Layout& layout, const int32_t* sums, int64_t i, int64_t rows, int64_t n, int64_t columns) {
         finish(sums, reinterpret_cast<const int32_t*>(packed + layout.sums) + n,
                reinterpret_cast<const float*>(packed + layout.scales) + n, scale_x + i, zero_points + i,
                bias ? bias + n : nullptr, rows, columns, out + (i - m0) * ldo + (n - n0), ldo);
       });
}

extern "C" void fxquant_linear_tile_int32(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    int32_t* out, int64_t ldo) {
  if (m0 >= m1) return;
  const int32_t* zero_points = reinterpret_cast<const int32_t*>(scratch + align64(m * 4));
  walk(scratch, m, packed, m0, m1, n0, n1,
       [&](const Layout& layout, const int32_t* sums, int64_t i, int64_t rows, int64_t n, int64_t columns) {
         const int32_t* column_sums = reinterpret_cast<const int32_t*>(packed + layout.sums) + n;
         for (int64_t r = 0; r < rows; r++)
           for (int64_t c = 0; c < columns; c++)
             out[(i - m0 + r) * ldo + (n - n0) + c] = static_cast<int32_t>(
                 static_cast<uint32_t>(sums[r * kPanel + c]) -
                 static_cast<uint32_t>(zero_points[i + r]) * static_cast<uint32_t>(column_sums[c]));
       });
}
