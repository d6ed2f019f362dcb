// The float linear.
#include "linear_float.h"

#include "harness.h"

#include <algorithm>
#include <array>

namespace sanitize {
namespace {

void shape(Run& run, int64_t m, int64_t n, int64_t k) {
  const int64_t ldx = k + m % 3, ldo = n + m % 2;
  const Guarded<float> weight = run.normals(n * k), bias = run.normals(n), x = run.rows(m, k, ldx, true);
  const Guarded<uint8_t> packed = run.buffer<uint8_t>(fxquant_float_packed_bytes(n, k));
  fxquant_float_pack(weight.data(), n, k, packed.data());
  const Guarded<float> out = run.buffer<float>((m - 1) * ldo + n);
  int64_t rows = 0, columns = 0;
  fxquant_float_tiles(m, n, 2, &rows, &columns);
  const std::string label = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  for (const float* added : {static_cast<const float*>(nullptr), static_cast<const float*>(bias.data())}) {
    for (int64_t i = 0; i < m; i += rows)
      for (int64_t j = 0; j < n; j += columns)
        fxquant_float_tile(x.data(), ldx, packed.data(), added, i, std::min(i + rows, m), j, std::min(j + columns, n),
                           out.data() + i * ldo + j, ldo);
    run.close(label, out, 1e-6 * static_cast<double>(k + 10));
  }
}

void linear_float(Run& run) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {1, 17, 3}, {2, 16, 4}, {3, 33, 5}, {5, 8, 63}, {13, 31, 65}, {25, 9, 385}, {11, 7, 769}})
    shape(run, m, n, k);
}

const Case kCase("linear_float", linear_float);

}  // namespace
}  // namespace sanitize
