// Compares one instruction set's kernels with the scalar ones on random and extreme operands; prints the differences.
#include "layout.h"
#include "linear.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using namespace fxquant;

int main() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  int64_t differences = 0, compared = 0;
  const int32_t bits[8][2] = {{8, 8}, {8, 7}, {7, 8}, {7, 7}, {6, 8}, {6, 6}, {4, 8}, {4, 4}};
  for (const auto& [weight_bits, act_bits] : bits)
    for (int64_t k : {1, 3, 4, 17, 64, 200})
      for (int64_t n : {1, 16, 37}) {
        const int32_t limit = (1 << (weight_bits - 1)) - 1, qmax = (1 << act_bits) - 1;
        std::vector<int8_t> codes(n * k);
        for (auto& code : codes) code = static_cast<int8_t>(k == 64 ? limit : std::lround(std::fmod(normal(random) * 40, limit)));
        std::vector<float> scales(n, 0.5f);
        std::vector<uint8_t> packed(fxquant_linear_packed_bytes(n, k, weight_bits, act_bits));
        if (fxquant_linear_pack(codes.data(), scales.data(), n, k, weight_bits, act_bits, packed.data())) return 2;
        const Layout layout(n, k, weight_bits, act_bits);
        const bool scheduled = has_schedule(weight_bits, act_bits);
        const int64_t rows = scheduled ? TABLE.rows_15 : TABLE.rows_8x8, stride = align64(k + 4);
        std::vector<uint8_t> a(rows * stride), b(rows * stride), c(stride), d(stride);
        std::vector<float> x(k), steps(k), sx(rows), out(rows * 16), ref(rows * 16), bias(16, 0.25f);
        std::vector<int32_t> za(rows), wanted(rows * 16);
        alignas(64) int32_t sums[kMaxRows * kPanel], both[2 * kMaxRows * kPanel];  // kernels store whole vectors
        for (int64_t r = 0; r < rows; r++) {
          for (auto& v : x) v = normal(random) * (r == 1 ? 1e30f : 1.f);
          if (r == 2) x[0] = INFINITY;
          float low = 0, high = 0, lowest = 0, highest = 0;
          const bool finite = TABLE.extent(x.data(), k, &low, &high);
          differences += finite != kScalar.extent(x.data(), k, &lowest, &highest);
          differences += finite && (low != lowest || high != highest);
          za[r] = qmax / 3;
          sx[r] = finite ? (high / qmax - low / qmax) * (r == 3 ? 0.01f : 1.f) : 1.f;
          if (!finite) x[0] = 0.5f;
          TABLE.encode(x.data(), k, qmax, sx[r], za[r], &a[r * stride]);
          kScalar.encode(x.data(), k, qmax, sx[r], za[r], &b[r * stride]);
          differences += std::memcmp(&a[r * stride], &b[r * stride], k) != 0;
          for (int64_t i = 0; i < k; i++) steps[i] = sx[r] * (1.f + 0.37f * (i % 5));
          if (r == 2 && k > 1) x[k - 1] = NAN;
          const bool coded = TABLE.encode_channels(x.data(), k, qmax, steps.data(), za[r], c.data());
          differences += coded != kScalar.encode_channels(x.data(), k, qmax, steps.data(), za[r], d.data());
          differences += coded && std::memcmp(c.data(), d.data(), k) != 0;
        }
        for (int64_t p = 0; p < layout.panels; p++) {
          (scheduled ? TABLE.panel_15 : TABLE.panel_8x8)(a.data(), stride, rows, packed.data(), layout, p, sums);
          kScalar.panel_8x8(a.data(), stride, rows, packed.data(), layout, p, wanted.data());
          differences += std::memcmp(sums, wanted.data(), rows * 64) != 0;
          if (TABLE.pair && p + 1 < layout.panels) {
            TABLE.pair(a.data(), stride, rows, packed.data(), layout, p, both);
            differences += std::memcmp(both, wanted.data(), rows * 64) != 0;
            kScalar.panel_8x8(a.data(), stride, rows, packed.data(), layout, p + 1, sums);
            differences += std::memcmp(&both[rows * 16], sums, rows * 64) != 0;
            std::memcpy(sums, wanted.data(), rows * 64);
          }
          const int64_t columns = std::min<int64_t>(16, n - p * 16);
          const auto* column_sums = reinterpret_cast<const int32_t*>(packed.data() + layout.sums) + p * 16;
          const auto* scale_w = reinterpret_cast<const float*>(packed.data() + layout.scales) + p * 16;
          const float* added = p % 2 ? bias.data() : nullptr;
          TABLE.finish(sums, column_sums, scale_w, sx.data(), za.data(), added, rows, columns, out.data(), 16);
          kScalar.finish(sums, column_sums, scale_w, sx.data(), za.data(), added, rows, columns, ref.data(), 16);
          for (int64_t i = 0; i < rows * 16; i++) differences += i % 16 < columns && std::memcmp(&out[i], &ref[i], 4) != 0 && !std::isnan(ref[i]);
          compared++;
        }
      }
  std::printf("%lld panels, %lld differences\n", static_cast<long long>(compared), static_cast<long long>(differences));
  return differences != 0;
}
