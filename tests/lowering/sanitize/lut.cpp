// 2-bit linears by look-up.
#include "lut.h"

#include "harness.h"
#include "linear.h"

#include <algorithm>
#include <array>

namespace sanitize {
namespace {

void shape(Run& run, int64_t m, int64_t n, int64_t k, int32_t act_bits) {
  const Guarded<int8_t> codes = run.codes(n * k, 1);
  const Guarded<float> scales = run.normals(n), x = run.rows(m, k, k);
  const Guarded<uint8_t> packed = run.buffer<uint8_t>(fxquant_lut_packed_bytes(n, k));
  if (fxquant_lut_pack(codes.data(), scales.data(), n, k, act_bits, packed.data()) != 0) std::abort();
  const Guarded<uint8_t> scratch = run.buffer<uint8_t>(fxquant_linear_scratch_bytes(m, k, 2, act_bits));
  const Guarded<uint8_t> tables = run.buffer<uint8_t>(fxquant_lut_table_bytes(k));
  fxquant_quantize_rows(x.data(), k, 0, m, k, 2, act_bits, scratch.data(), m);
  const Guarded<int32_t> sums = run.buffer<int32_t>(m * n);
  const Guarded<float> out = run.buffer<float>(m * n);
  int64_t rows = 0, columns = 0;
  fxquant_lut_tiles(m, n, 2, &rows, &columns);
  for (int64_t i = 0; i < m; i += rows)
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t i1 = std::min(i + rows, m), j1 = std::min(j + columns, n);
      fxquant_lut_tile(scratch.data(), m, packed.data(), i, i1, j, j1, tables.data(), out.data() + i * n + j, n);
      fxquant_lut_tile_int32(scratch.data(), m, packed.data(), i, i1, j, j1, tables.data(), sums.data() + i * n + j, n);
    }
  const std::string label = "a" + std::to_string(act_bits) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  run.exact(label + " sums", sums);
  run.exact(label, out);
}

void lut(Run& run) {
  for (const int32_t act_bits : {4, 5, 6})
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {1, 17, 15}, {2, 33, 16}, {7, 130, 17}, {9, 15, 63}, {17, 3, 530}})
      shape(run, m, n, k, act_bits);
}

const Case kCase("lut", lut);

}  // namespace
}  // namespace sanitize
