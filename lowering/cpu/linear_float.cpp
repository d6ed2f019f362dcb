// Packs a float weight and walks over an output tile with the kernels of the instruction set in force.
#include "isa.h"
#include "linear_float.h"
#include "linear_float_layout.h"

#include <algorithm>
#include <cstring>

namespace fxquant {
namespace {

void panel(const float* x, int64_t, const float* w, int64_t k, const float* bias, bool first, int64_t columns, float* out,
           int64_t) {
  float sums[kPanel];
  for (int64_t c = 0; c < columns; c++) sums[c] = !first ? out[c] : bias ? bias[c] : 0.f;
  for (int64_t i = 0; i < k; i++)
    for (int64_t c = 0; c < columns; c++) sums[c] += x[i] * w[i * kPanel + c];
  std::memcpy(out, sums, columns * sizeof(float));
}

}  // namespace

const FloatKernels kFloatScalar = {{panel}, 1};

}  // namespace fxquant

using namespace fxquant;

namespace {

constexpr const FloatKernels* kTable[] = {&kFloatScalar, &kFloatAvx2, &kFloatAvx2, &kFloatAvx512};

constexpr int64_t kTileRows = 132, kTileColumns = 256;

}  // namespace

extern "C" int64_t fxquant_float_packed_bytes(int64_t n, int64_t k) { return float_packed_bytes(n, k); }

extern "C" void fxquant_float_pack(const float* weight, int64_t n, int64_t k, uint8_t* out) {
  std::memset(out, 0, float_packed_bytes(n, k));
  const Header header{kFloatMagic, kVersion, n, k, 32, 32};
  std::memcpy(out, &header, sizeof header);
  float* panels = reinterpret_cast<float*>(out + 64);
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < k; i++) panels[(j / kPanel * k + i) * kPanel + j % kPanel] = weight[j * k + i];
}

extern "C" void fxquant_float_tiles(int64_t m, int64_t n, int64_t threads, int64_t* rows, int64_t* columns) {
  constexpr int64_t kTilesPerThread = 4;  // so that the threads finish together
  *rows = even_share(std::max<int64_t>(m, 1), kTileRows);
  *rows = (*rows + kFloatMaxRows - 1) / kFloatMaxRows * kFloatMaxRows;  // whole blocks of 6 and of 12
  *columns = kTileColumns;
  const auto count = [&] { return ((m + *rows - 1) / *rows) * ((n + *columns - 1) / *columns); };
  while (*columns > kPanel && count() < threads * kTilesPerThread) *columns /= 2;
}

extern "C" void fxquant_float_tile(
    const float* x, int64_t ldx, const uint8_t* packed, const float* bias, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
    float* out, int64_t ldo) {
  if (m0 >= m1) return;
  const int64_t k = reinterpret_cast<const Header*>(packed)->k;
  const float* weights = reinterpret_cast<const float*>(packed + 64);
  const FloatKernels& kernels = *kTable[fxquant_isa()];
  const int64_t block = even_share(m1 - m0, kernels.rows);
  for (int64_t s = 0; s < k; s += kFloatChunk) {
    const int64_t count = std::min(kFloatChunk, k - s);
    for (int64_t n = n0; n < n1; n += kPanel) {
      const float* w = weights + (n / kPanel * k + s) * kPanel;
      const float* b = bias ? bias + n : nullptr;
      for (int64_t i = m0; i < m1; i += block)
        kernels.panel[std::min(block, m1 - i) - 1](x + i * ldx + s, ldx, w, count, b, s == 0, std::min(kPanel, n1 - n),
                                                   out + (i - m0) * ldo + (n - n0), ldo);
    }
  }
}
