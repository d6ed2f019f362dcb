// Sigmoid attention, forward and backward, in float32 and float64: masks of both kinds, slopes, the causal rule, strides.
#include "flash_sigmoid.h"

#include "harness.h"

#include <array>

namespace sanitize {
namespace {

constexpr double kTolerance = 2e-5;

template <typename T>
Guarded<T> draw(Run& run, int64_t count) {
  Guarded<T> made = run.buffer<T>(count);
  for (T& value : made) value = std::normal_distribution<T>()(run.random);
  return made;
}

template <typename T>
void shape(Run& run, int64_t n, int64_t m, int64_t d, int64_t e, int32_t variant) {
  const int64_t pad = variant % 2, turned = variant == 3;  // keys as columns
  const Guarded<T> q = draw<T>(run, (n - 1) * (d + pad) + d), k = draw<T>(run, m * d), v = draw<T>(run, (m - 1) * (e + pad) + e);
  const Guarded<T> added = draw<T>(run, n * m), grad = draw<T>(run, n * e);
  const Guarded<uint8_t> hidden = run.buffer<uint8_t>(m);
  for (uint8_t& seen : hidden) seen = run.random() % 4 != 0;
  FxquantSigmoidHead head{};
  head.q = q.data(), head.k = k.data(), head.v = v.data();
  head.n = n, head.m = m, head.d = d, head.e = e;
  head.q_row = d + pad, head.v_row = e + pad, head.k_row = turned ? 1 : d, head.k_column = turned ? m : 1;
  head.scale = 0.3, head.bias = -1.5, head.is_double = sizeof(T) == 8;
  if (variant == 1) head.mask = added.data(), head.mask_kind = 1, head.mask_row = m, head.mask_column = 1;
  if (variant == 2) head.mask = hidden.data(), head.mask_kind = 2, head.mask_row = 0, head.mask_column = 1;
  if (variant == 3) head.causal = 1, head.slope = 0.1;
  const std::string label = "variant " + std::to_string(variant) + " " + std::to_string(n) + "x" + std::to_string(m) + "x" +
                            std::to_string(d) + "x" + std::to_string(e);
  const Guarded<T> out = run.buffer<T>(n * e), grad_q = run.buffer<T>(n * d), grad_k = run.buffer<T>(m * d), grad_v = run.buffer<T>(m * e);
  fxquant_sigmoid_attention(&head, 0, n / 2, out.data());
  fxquant_sigmoid_attention(&head, n / 2, n, out.data());
  run.close(label, out, kTolerance);
  fxquant_sigmoid_attention_gradients(&head, grad.data(), grad_q.data(), grad_k.data(), grad_v.data());
  run.close(label + " grad q", grad_q, kTolerance);
  run.close(label + " grad k", grad_k, kTolerance);
  run.close(label + " grad v", grad_v, kTolerance);
}

void flash_sigmoid(Run& run) {
  for (int32_t variant = 0; variant < 4; variant++)
    for (const auto& [n, m, d, e] : {std::array<int64_t, 4>{1, 1, 1, 1}, {2, 3, 5, 17}, {7, 33, 16, 9}, {50, 19, 3, 33}, {13, 260, 8, 8}}) {
      shape<float>(run, n, m, d, e, variant);
      shape<double>(run, n, m, d, e, variant);
    }
}

const Case kCase("flash_sigmoid", flash_sigmoid);

}  // namespace
}  // namespace sanitize
