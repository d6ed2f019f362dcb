// Runs every case at every instruction set of this CPU with guards at either end, and compares with the scalar kernels.
// `program CASE` runs one case; `program --break WHAT` commits one error, which the sanitizers must report.
#include "harness.h"
#include "isa.h"

#include <cfloat>
#include <climits>
#include <cmath>
#include <map>

namespace sanitize {
namespace {

std::map<std::string, CaseFn>& cases() {
  static std::map<std::string, CaseFn> all;
  return all;
}

bool is_close(double value, double wanted, double tolerance) {
  if (std::isnan(value) || std::isnan(wanted)) return std::isnan(value) == std::isnan(wanted);
  if (tolerance == 0 || std::isinf(value) || std::isinf(wanted))
    return value == wanted && std::signbit(value) == std::signbit(wanted);
  return std::abs(value - wanted) <= tolerance * std::max(1.0, std::abs(wanted));
}

int64_t differences(const char* name, int32_t isa, const std::vector<Output>& got, const std::vector<Output>& wanted) {
  int64_t count = got.size() != wanted.size();
  for (size_t i = 0; i < std::min(got.size(), wanted.size()); i++) {
    const Output &a = got[i], &b = wanted[i];
    count += a.values.size() != b.values.size();
    for (size_t j = 0; j < std::min(a.values.size(), b.values.size()); j++) {
      if (is_close(a.values[j], b.values[j], a.tolerance)) continue;
      if (count++ < 5)
        std::printf("%s, isa %d, %s [%zu]: %.9g, scalar %.9g\n", name, isa, a.label.c_str(), j, a.values[j], b.values[j]);
    }
  }
  return count;
}

int64_t check(const char* name, CaseFn run, int64_t& compared) {
  int64_t count = 0;
  for (const Edge edge : {Edge::kEnd, Edge::kStart}) {
    fxquant_set_isa(0);
    Run scalar(edge);
    run(scalar);
    for (int32_t isa = 1; isa <= 3; isa++) {
      if (fxquant_set_isa(isa) != isa) continue;
      Run level(edge);
      run(level);
      count += differences(name, isa, level.outputs, scalar.outputs);
      for (const Output& output : level.outputs) compared += static_cast<int64_t>(output.values.size());
    }
  }
  return count;
}

// Errors that must end the program: the read in assembly is one that only the guard page sees.
int commit(const std::string& what) {
  const Run after(Edge::kEnd), before(Edge::kStart);
  volatile int32_t one = 1;
  if (what == "read-after") return after.buffer<int8_t>(3)[3];
  if (what == "read-before") return before.buffer<int8_t>(3)[-one];
  if (what == "read-in-assembly") {
    const Guarded<int8_t> buffer = after.buffer<int8_t>(3);
    int32_t value;
    asm volatile("movl (%1), %0" : "=r"(value) : "r"(buffer.data()) : "memory");
    return value;
  }
  if (what == "overflow") return one + INT_MAX;
  if (what == "shift") return one << (31 + one);
  if (what == "misaligned") return *reinterpret_cast<const int32_t*>(before.buffer<int8_t>(8).data() + one);
  if (what == "leak") {
    static volatile uintptr_t gone = 0;
    gone = ~reinterpret_cast<uintptr_t>(std::malloc(64));
    return 0;
  }
  std::printf("no such error: %s\n", what.c_str());
  return 0;
}

int run_all(const char* only) {
  int64_t count = 0, ran = 0;
  for (const auto& [name, run] : cases()) {
    if (only != nullptr && name != only) continue;
    int64_t compared = 0;
    const int64_t found = check(name.c_str(), run, compared);
    std::printf("%s: %lld numbers, %lld differences\n", name.c_str(), static_cast<long long>(compared), static_cast<long long>(found));
    std::fflush(stdout);
    count += found;
    ran++;
  }
  return ran == 0 || count != 0;
}

}  // namespace

Case::Case(const char* name, CaseFn run) { cases()[name] = run; }

Guarded<float> Run::rows(int64_t m, int64_t k, int64_t stride, bool finite) {
  Guarded<float> made(m == 0 ? 0 : (m - 1) * stride + k, edge_);
  const float scales[] = {1.f, FLT_MAX, 0.f, 1e-40f, 1.f, 1.f};
  for (int64_t i = 0; i < m; i++) {
    float* row = made.data() + i * stride;
    const int64_t kind = static_cast<int64_t>(random() % 6);
    for (int64_t j = 0; j < k; j++)
      row[j] = std::uniform_real_distribution<float>(-1.f, 1.f)(random) * scales[finite && kind == 1 ? 0 : kind];
    if (kind == 1 && !finite) row[0] = FLT_MAX, row[k - 1] = -FLT_MAX;
    if (kind == 4 && !finite) row[k - 1] = NAN;
    if (kind == 5 && !finite) row[k / 2] = i % 2 ? INFINITY : -INFINITY;
  }
  return made;
}

}  // namespace sanitize

int main(int count, char** words) {
  if (count == 3 && std::string(words[1]) == "--break") return sanitize::commit(words[2]);
  return sanitize::run_all(count > 1 ? words[1] : nullptr);
}
