// Decode linears: weight-only and integer schemes, one row and many, grouped and not.
#include "stream.h"

#include "harness.h"

#include <array>

namespace sanitize {
namespace {

struct Scheme {
  int32_t weight_bits, act_bits, group;
};
constexpr Scheme kSchemes[] = {{2, 16, 0}, {2, 16, 16}, {4, 16, 0}, {4, 16, 48}, {8, 16, 0}, {8, 16, 32}, {4, 8, 0}, {4, 8, 16}, {4, 8, 256}};

void shape(Run& run, const Scheme& scheme, int64_t m, int64_t n, int64_t k) {
  const auto [w, a, group] = scheme;
  const int64_t groups = group == 0 ? 1 : (k + group - 1) / group, ldx = k + m % 3, ldo = n + m % 2;
  const Guarded<int8_t> codes = run.codes(n * k, (1 << (w - 1)) - 1);
  const Guarded<float> scales = run.normals(n * groups), bias = run.normals(n), x = run.rows(m, k, ldx, a == 16);
  const Guarded<uint8_t> packed = run.buffer<uint8_t>(fxquant_stream_packed_bytes(n, k, w, a, group));
  if (fxquant_stream_pack(codes.data(), scales.data(), n, k, w, a, group, packed.data()) != 0) std::abort();
  const std::string label = "w" + std::to_string(w) + "a" + std::to_string(a) + "-g" + std::to_string(group) + " " +
                            std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
  const Guarded<int8_t> codes_back = run.buffer<int8_t>(n * k);
  const Guarded<float> scales_back = run.buffer<float>(n * groups);
  fxquant_stream_unpack(packed.data(), codes_back.data(), scales_back.data());
  if (std::memcmp(codes.data(), codes_back.data(), n * k) != 0) std::abort();
  if (std::memcmp(scales.data(), scales_back.data(), n * groups * 4) != 0) std::abort();
  const Guarded<uint8_t> scratch = run.buffer<uint8_t>(fxquant_stream_scratch_bytes(packed.data(), m));
  fxquant_stream_prepare(x.data(), ldx, 0, m, m, packed.data(), scratch.data());
  if (a == 8) {
    const Guarded<int32_t> sums = run.buffer<int32_t>(m * groups * n);
    fxquant_stream_sums(scratch.data(), m, packed.data(), sums.data());
    run.exact(label + " sums", sums);
  }
  const double tolerance = 1e-5 * static_cast<double>((1 << w) + k);
  const Guarded<float> out = run.buffer<float>((m - 1) * ldo + n), once = run.buffer<float>(m * n);
  const int64_t half = n / 2 / 16 * 16;
  for (const auto& [n0, n1] : {std::array<int64_t, 2>{0, half}, {half, n}})
    fxquant_stream_run(x.data(), ldx, scratch.data(), m, packed.data(), nullptr, 0, m, n0, n1, out.data() + n0, ldo);
  fxquant_stream_linear(x.data(), ldx, m, packed.data(), bias.data(), 0, n, once.data(), n);
  // The largest values are of the size of FLT_MAX with 8-bit activations, where the order of groups decides on infinity.
  if (a == 16) {
    run.close(label, out, tolerance);
    run.close(label + " bias", once, tolerance);
  }
}

void table(Run& run, int32_t group, int64_t m, int64_t n, int64_t k) {
  const int64_t groups = group == 0 ? 1 : (k + group - 1) / group;
  const Guarded<int8_t> codes = run.codes(n * k, 7);
  for (int64_t i = 0; i < n * k; i++) codes.data()[i] = static_cast<int8_t>(codes.data()[i] + 8);
  const Guarded<float> scales = run.normals(n * groups), bias = run.normals(n), x = run.rows(m, k, k, true);
  const Guarded<float> values = run.normals(16), out = run.buffer<float>(m * n);
  const Guarded<uint8_t> packed = run.buffer<uint8_t>(fxquant_stream_table_bytes(n, k, group));
  if (fxquant_stream_pack_table(codes.data(), values.data(), scales.data(), n, k, group, packed.data()) != 0) std::abort();
  fxquant_stream_linear(x.data(), k, m, packed.data(), bias.data(), 0, n, out.data(), n);
  run.close("table-g" + std::to_string(group) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k), out,
            1e-5 * static_cast<double>(16 + k));
}

void stream(Run& run) {
  for (const Scheme& scheme : kSchemes)
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {1, 17, 15}, {1, 16, 16}, {1, 35, 261}, {2, 33, 17}, {7, 16, 63}, {13, 3, 300}, {130, 5, 33}})
      shape(run, scheme, m, n, k);
  for (const int32_t group : {0, 16, 64})
    for (const auto& [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {1, 17, 15}, {2, 33, 70}, {7, 16, 63}, {4, 3, 300}})
      table(run, group, m, n, k);
}

const Case kCase("stream", stream);

}  // namespace
}  // namespace sanitize
