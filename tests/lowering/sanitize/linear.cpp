// Low-bit linears: packing, quantizing with each row's or with fixed qparams, tiles of floats and of sums.
#include "linear.h"

#include "harness.h"

#include <algorithm>
#include <string>

namespace sanitize {
namespace {

struct Shape {
  int64_t m, n, k;
};
constexpr Shape kShapes[] = {{1, 1, 1},   {1, 17, 3},   {2, 16, 4},   {3, 33, 5},  {5, 15, 63},
                             {7, 65, 64}, {13, 31, 65}, {15, 48, 129}, {29, 5, 258}, {2, 3, 1027}};
constexpr int32_t kWidths[][2] = {{8, 8}, {8, 7}, {7, 8}, {6, 8}, {4, 4}};

// A team of three whose first thread comes last, and whose second one does everything: each tile is taken once.
void team(Run& run, const std::string& label, const Shape& s, int32_t w, int32_t a, const Guarded<float>& x, int64_t ldx,
          const Guarded<uint8_t>& packed) {
  const auto [m, n, k] = s;
  const Guarded<uint8_t> scratch = run.buffer<uint8_t>(fxquant_linear_scratch_bytes(m, k, w, a));
  const Guarded<int32_t> sums = run.buffer<int32_t>(m * n);
  int64_t covered = 0;
  FxquantTeam team;
  fxquant_team_start(&team, m, n, k, w, a, 3);
  std::fill_n(team.seats, 3, FxquantSeat{});
  team.threads = 3;  // where a small linear would be one thread's
  for (const int64_t seat : {1, 2, 0}) {
    fxquant_team_quantize(&team, seat, x.data(), ldx, nullptr, nullptr, scratch.data());
    FxquantTile t;
    while (fxquant_team_tile(&team, seat, &t)) {
      covered += (t.m1 - t.m0) * (t.n1 - t.n0);
      fxquant_linear_tile_int32(scratch.data(), m, packed.data(), t.m0, t.m1, t.n0, t.n1, sums.data() + t.m0 * n + t.n0, n);
    }
  }
  if (covered != m * n) std::abort();
  run.exact(label + " team", sums);
}

void shape(Run& run, const Shape& s, int32_t w, int32_t a) {
  const auto [m, n, k] = s;
  const int64_t ldx = k + m % 3, ldo = n + m % 2;
  const Guarded<int8_t> codes = run.codes(n * k, (1 << (w - 1)) - 1);
  const Guarded<float> scales = run.normals(n), bias = run.normals(n), x = run.rows(m, k, ldx);
  const Guarded<uint8_t> packed = run.buffer<uint8_t>(fxquant_linear_packed_bytes(n, k, w, a));
  if (fxquant_linear_pack(codes.data(), scales.data(), n, k, w, a, packed.data()) != 0) std::abort();
  const Guarded<uint8_t> scratch = run.buffer<uint8_t>(fxquant_linear_scratch_bytes(m, k, w, a));
  fxquant_quantize_rows(x.data(), ldx, 0, m, k, w, a, scratch.data(), m);
  const std::string label = "w" + std::to_string(w) + "a" + std::to_string(a) + " " + std::to_string(m) + "x" +
                            std::to_string(n) + "x" + std::to_string(k);
  const Guarded<int32_t> sums = run.buffer<int32_t>(m * n);
  fxquant_linear_tile_int32(scratch.data(), m, packed.data(), 0, m, 0, n, sums.data(), n);
  run.exact(label + " sums", sums);
  const Guarded<float> whole = run.buffer<float>((m - 1) * ldo + n);
  fxquant_linear_tile(scratch.data(), m, packed.data(), 0, m, 0, n, whole.data(), ldo);
  run.exact(label, whole);
  int64_t rows = 0, columns = 0;
  fxquant_linear_tiles(m, n, w, a, 2, &rows, &columns);
  for (int64_t i = 0; i < m; i += rows)
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t i1 = std::min(i + rows, m), j1 = std::min(j + columns, n);
      const Guarded<float> tile = run.buffer<float>((i1 - i) * (j1 - j));
      fxquant_linear_bias_tile(scratch.data(), m, packed.data(), bias.data(), i, i1, j, j1, tile.data(), j1 - j);
      for (int64_t r = 0; r < i1 - i; r++)
        for (int64_t c = 0; c < j1 - j; c++) whole[(i + r) * ldo + j + c] = tile[r * (j1 - j) + c];
    }
  run.exact(label + " bias", whole);
  team(run, label, s, w, a, x, ldx, packed);
  const Guarded<float> steps = run.buffer<float>(k);
  for (int64_t i = 0; i < k; i++) steps[i] = 1e-3f * static_cast<float>(1 + i % 7);
  const int32_t zero_point = 1 << (a - 1);
  fxquant_quantize_rows_static(x.data(), ldx, 0, m, k, w, a, steps.data(), &zero_point, scratch.data(), m);
  fxquant_linear_tile_int32(scratch.data(), m, packed.data(), 0, m, 0, n, sums.data(), n);
  run.exact(label + " static", sums);
}

void linear(Run& run) {
  for (const auto& [w, a] : kWidths)
    for (const Shape& s : kShapes) shape(run, s, w, a);
}

const Case kCase("linear", linear);

}  // namespace
}  // namespace sanitize
