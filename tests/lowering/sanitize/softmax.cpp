// Softmax and log-softmax in every form, whole rows and in parts; the exponential.
#include "softmax.h"

#include "harness.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace sanitize {
namespace {

void rows(Run& run, int64_t m, int64_t n) {
  const Guarded<float> x = run.rows(m, n, n), y = run.buffer<float>(m * n);
  for (const int32_t log : {0, 1})
    for (const int32_t form : {FXQUANT_SOFTMAX_THREE_PASS, FXQUANT_SOFTMAX_TWO_PASS, FXQUANT_SOFTMAX_BLOCKED}) {
      if (log && form == FXQUANT_SOFTMAX_TWO_PASS) continue;
      fxquant_softmax_rows(x.data(), y.data(), m, n, log, form);
      run.close("log " + std::to_string(log) + " form " + std::to_string(form) + " n " + std::to_string(n), y, 1e-5);
    }
}

void parts(Run& run, int64_t n, int32_t form) {
  const Guarded<float> x = run.normals(n, 30.f), y = run.buffer<float>(n);
  const int64_t count = (n + FXQUANT_SOFTMAX_PART - 1) / FXQUANT_SOFTMAX_PART;
  const Guarded<FxquantSoftmaxSum> sums = run.buffer<FxquantSoftmaxSum>(count), total = run.buffer<FxquantSoftmaxSum>(1);
  fxquant_softmax_sums(x.data(), n, 0, count, form, sums.data());
  const int32_t chosen = fxquant_softmax_merge(x.data(), n, form, sums.data(), total.data());
  fxquant_softmax_write(x.data(), y.data(), n, 0, count, 0, chosen, total.data());
  run.close("parts, form " + std::to_string(form), y, 1e-5);
}

void softmax(Run& run) {
  for (const int64_t n : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1000, 4099}) rows(run, 13, n);
  for (const int32_t form : {FXQUANT_SOFTMAX_TWO_PASS, FXQUANT_SOFTMAX_BLOCKED}) parts(run, FXQUANT_SOFTMAX_PART + 3, form);
  const Guarded<float> x = run.buffer<float>(37), y = run.buffer<float>(37);
  for (int64_t i = 0; i < 37; i++) x[i] = static_cast<float>(i * 5 - 100);
  x[0] = -INFINITY, x[36] = -1e30f;
  for (float& value : x) value = std::min(value, 80.f);
  fxquant_exp(x.data(), y.data(), 37);
  run.close("exp", y, 1e-6);
}

const Case kCase("softmax", softmax);

}  // namespace
}  // namespace sanitize
