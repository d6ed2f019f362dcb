// Packs 2-bit weights for look-ups and walks over an output tile with the kernels of the instruction set in force.
#include "isa.h"
#include "lut.h"
#include "lut_layout.h"

#include <algorithm>
#include <cstring>

using namespace fxquant;

namespace {

constexpr const LutKernels* kTable[] = {&kLutScalar, &kLutAvx2, &kLutAvx2, &kLutAvx512};
constexpr const Kernels* kLinear[] = {&kScalar, &kAvx2, &kAvxVnni, &kAvx512Vnni};

// One block of rows against columns n0 .. n1: a chunk of k after the other, so that its tables stay in L1.
// use(sums, panel) takes each panel's sums, int32 [kLutRows][16].
template <typename Use>
void block(const LutKernels& kernels, const LutLayout& layout, const uint8_t* packed, int32_t depth, const uint8_t* tables,
           int64_t rows, int64_t n0, int64_t n1, Use use) {
  alignas(64) int32_t sums[kLutPanels * kLutSums];
  const LutLookUpFn look_up = kernels.look_up[depth / 2][rows - 1];
  const int64_t last = (n1 + kPanel - 1) / kPanel;
  for (int64_t p0 = n0 / kPanel; p0 < last; p0 += kLutPanels) {
    const int64_t p1 = std::min(p0 + kLutPanels, last);
    for (int64_t s = 0; s < layout.steps; s += kLutChunk) {
      const int64_t steps = std::min(kLutChunk, layout.steps - s);
      for (int64_t p = p0; p < p1; p += kernels.panels) {
        const uint8_t* indices = packed + layout.indices + (p * layout.steps + s) * 64;
        const uint8_t* next = p + 1 < p1 ? indices + layout.steps * 64 : indices;  // a last panel alone is looked up twice
        look_up(tables + s * kLutRows * 64, indices, next, steps, s == 0, sums + (p - p0) * kLutSums);
      }
    }
    for (int64_t p = p0; p < p1; p++) use(sums + (p - p0) * kLutSums, p);
  }
}

// Builds the tables of each block of rows; use(sums, row, rows, column, columns, layout) takes what comes of it.
template <typename Use>
void walk(const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
          uint8_t* tables, Use use) {
  const Header& header = *reinterpret_cast<const Header*>(packed);
  const LutLayout layout(header.n, header.k);
  const LutKernels& kernels = *kTable[fxquant_isa()];
  const Scratch codes(m, header.k, false);
  for (int64_t i = m0; i < m1; i += kLutRows) {
    const int64_t rows = std::min(kLutRows, m1 - i);
    for (int64_t r = 0; r < rows; r++) kernels.build(scratch + codes.codes + (i + r) * codes.stride, layout.steps, tables + r * 64);
    block(kernels, layout, packed, lut_depth(header.act_bits), tables, rows, n0, n1, [&](const int32_t* sums, int64_t p) {
      use(sums, i, rows, p * kPanel, std::min(kPanel, n1 - p * kPanel), layout);
    });
  }
}

}  // namespace

extern "C" int64_t fxquant_lut_packed_bytes(int64_t n, int64_t k) { return LutLayout(n, k).bytes; }

extern "C" int64_t fxquant_lut_table_bytes(int64_t k) { return LutLayout(1, k).steps * kLutRows * 64; }

extern "C" int32_t fxquant_lut_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t act_bits, uint8_t* out) {
  if (std::any_of(codes, codes + n * k, [](int8_t code) { return code < -1 || code > 1; })) return 1;
  const LutLayout layout(n, k);
  std::memset(out, 0, layout.bytes);
  const Header header{kLutMagic, kVersion, n, k, 2, act_bits};
  std::memcpy(out, &header, sizeof header);
  std::memcpy(out + layout.scales, scales, n * sizeof(float));
  int32_t* sums = reinterpret_cast<int32_t*>(out + layout.sums);
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < k; i++) {
      const int8_t code = codes[j * k + i];
      const int64_t step = j / kPanel * layout.steps + i / kLutStep, half = i % kLutStep / 8;
      uint8_t* pair = out + layout.indices + step * 64 + half * 32 + j % kPanel * 2;
      if (code != 0) pair[code < 0] = static_cast<uint8_t>(pair[code < 0] | 1 << i % 8);
      sums[j] += code;
    }
  return 0;
}

extern "C" void fxquant_lut_tiles(int64_t m, int64_t n, int64_t threads, int64_t* rows, int64_t* columns) {
  constexpr int64_t kTasksPerThread = 4;  // so that the threads finish together
  const int64_t blocks = (m + kLutRows - 1) / kLutRows;
  // Every task builds its block's tables anew, so columns are split only where there are too few blocks.
  const int64_t parts = threads == 1 ? 1 : std::max<int64_t>(1, kTasksPerThread * threads / std::max<int64_t>(blocks, 1));
  constexpr int64_t kPair = 2 * kPanel;
  *rows = kLutRows;
  *columns = ((n + parts - 1) / parts + kPair - 1) / kPair * kPair;
}

extern "C" void fxquant_lut_tile(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    uint8_t* tables, float* out, int64_t ldo) {
  const float* scale_x = reinterpret_cast<const float*>(scratch);
  const int32_t* zero_points = reinterpret_cast<const int32_t*>(scratch + align64(m * 4));
  const FinishFn finish = kLinear[fxquant_isa()]->finish;
  walk(scratch, m, packed, m0, m1, n0, n1, tables,
       [&](const int32_t* sums, int64_t i, int64_t rows, int64_t n, int64_t columns, const LutLayout& layout) {
         finish(sums, reinterpret_cast<const int32_t*>(packed + layout.sums) + n,
                reinterpret_cast<const float*>(packed + layout.scales) + n, scale_x + i, zero_points + i, nullptr, rows, columns,
                out + (i - m0) * ldo + (n - n0), ldo);
       });
}

extern "C" void fxquant_lut_tile_int32(
    const uint8_t* scratch, int64_t m, const uint8_t* packed, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    uint8_t* tables, int32_t* out, int64_t ldo) {
  const int32_t* zero_points = reinterpret_cast<const int32_t*>(scratch + align64(m * 4));
  walk(scratch, m, packed, m0, m1, n0, n1, tables,
       [&](const int32_t* sums, int64_t i, int64_t rows, int64_t n, int64_t columns, const LutLayout& layout) {
         const int32_t* column_sums = reinterpret_cast<const int32_t*>(packed + layout.sums) + n;
         for (int64_t r = 0; r < rows; r++)
           for (int64_t c = 0; c < columns; c++)
             out[(i - m0 + r) * ldo + (n - n0) + c] = sums[r * kPanel + c] - zero_points[i + r] * column_sums[c];
       });
}
