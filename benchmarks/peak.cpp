// What this machine's cores can do at most, as seen from `argv[1]` threads: lines "name value" (GOP/s and GB/s, all
// threads together). Built and run by kernels.py.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLoops = 2'000'000;
constexpr int kTries = 9;

// Twelve independent accumulators: as many as a 6 x 16 tile has, more than any latency needs.
#define TWELVE(X) X(a) X(b) X(c) X(d) X(e) X(f) X(g) X(h) X(i) X(j) X(k) X(l)
#define DECLARE(v) __m256i v = x;
#define MADDUBS(v) asm volatile("vpmaddubsw %1, %1, %%ymm15\n\tvpaddw %%ymm15, %0, %0" : "+x"(v) : "x"(x) : "xmm15");
#define MADDWD(v) asm volatile("vpmaddwd %1, %1, %%ymm15\n\tvpaddd %%ymm15, %0, %0" : "+x"(v) : "x"(x) : "xmm15");
#define FMA(v) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(v) : "x"(x));
#define MIX(name, STEP)                                   \
  void name() {                                           \
    const __m256i x = _mm256_setzero_si256();             \
    TWELVE(DECLARE)                                       \
    for (int64_t n = 0; n < kLoops; n++) { TWELVE(STEP) } \
  }
MIX(maddubs, MADDUBS)
MIX(maddwd, MADDWD)
MIX(fma, FMA)

void read(const void* from, int64_t bytes) {
  const auto* p = static_cast<const __m256i*>(from);
  for (int64_t n = 0; n < bytes / 32; n += 4)
    asm volatile("vmovdqa (%0), %%ymm0\n\tvmovdqa 32(%0), %%ymm1\n\tvmovdqa 64(%0), %%ymm2\n\tvmovdqa 96(%0), %%ymm3"
                 : : "r"(p + n) : "xmm0", "xmm1", "xmm2", "xmm3");
}

// The best rate of kTries, in 1e9 units a second, when every thread does `units`.
double best(int threads, double units, const std::function<void(int)>& work) {
  double rate = 0;
  for (int t = 0; t < kTries; t++) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; i++) pool.emplace_back(work, i);
    work(0);
    for (auto& thread : pool) thread.join();
    const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    rate = std::max(rate, threads * units / spent / 1e9);
  }
  return rate;
}

double bandwidth(int threads, int64_t bytes, int repeats) {
  std::vector<void*> buffers;
  for (int i = 0; i < threads; i++) {
    buffers.push_back(std::aligned_alloc(4096, bytes));
    std::fill_n(static_cast<char*>(buffers.back()), bytes, 1);
  }
  const double rate = best(threads, static_cast<double>(bytes) * repeats, [&](int i) {
    for (int r = 0; r < repeats; r++) read(buffers[i], bytes);
  });
  for (void* buffer : buffers) std::free(buffer);
  return rate;
}

}  // namespace

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  std::printf("fma %.1f\n", best(threads, kLoops * 12.0 * 16, [](int) { fma(); }));
  std::printf("maddubs %.1f\n", best(threads, kLoops * 12.0 * 64, [](int) { maddubs(); }));
  std::printf("maddwd %.1f\n", best(threads, kLoops * 12.0 * 32, [](int) { maddwd(); }));
  std::printf("cache %.1f\n", bandwidth(threads, 4 << 20, 20));    // 4 MiB a thread: beyond L2, within L3
  std::printf("memory %.1f\n", bandwidth(threads, 192 << 20, 1));  // beyond every cache
}
