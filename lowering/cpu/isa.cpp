// The instruction set in force: what this CPU has, unless something lower was asked for.
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cpuid.h>

namespace {

int32_t detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return 3;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool avx_vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  return avx_vnni ? 2 : 1;
}

// A CPU with AVX512-VNNI need not have AVX-VNNI: that level then runs the AVX2 kernels.
bool runs(int32_t isa) {
  if (isa != 2) return isa <= detect();
  unsigned a = 0, b = 0, c = 0, d = 0;
  return detect() >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

std::atomic<int32_t> current{-1};

}  // namespace

extern "C" int32_t fxquant_isa(void) {
  int32_t isa = current.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = detect();
    current.store(isa, std::memory_order_relaxed);
  }
  return isa;
}

extern "C" int32_t fxquant_set_isa(int32_t isa) {
  int32_t chosen = std::clamp(isa, 0, 3);
  while (!runs(chosen)) chosen--;
  current.store(chosen, std::memory_order_relaxed);
  return chosen;
}
