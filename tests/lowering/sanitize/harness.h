// Buffers between guard pages, and what a kernel's case needs. A case is one file: see lut.cpp for a short one.
#pragma once
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace sanitize {

enum class Edge { kEnd, kStart };  // which end of a buffer abuts a page that nobody may touch

// `count` values with no accessible byte on one side and, as far as AddressSanitizer sees, none on the other. Filled with
// 0xff, which is NaN for numbers: a hole in an output shows.
template <typename T>
class Guarded {
 public:
  Guarded(int64_t count, Edge edge) : count_(count) {
    const size_t bytes = count * sizeof(T), body = (bytes + kPage - 1) / kPage * kPage;
    size_ = body + 2 * kPage;
    base_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (body != 0 && mprotect(base_ + kPage, body, PROT_READ | PROT_WRITE) != 0)) {
      std::perror("guarded buffer");
      std::abort();
    }
    uint8_t* from = base_ + kPage + (edge == Edge::kEnd ? body - bytes : 0);
    data_ = reinterpret_cast<T*>(from);
    std::memset(from, 0xff, bytes);
    ASAN_POISON_MEMORY_REGION(base_ + kPage, from - base_ - kPage);
    ASAN_POISON_MEMORY_REGION(from + bytes, base_ + kPage + body - from - bytes);
  }
  ~Guarded() {
    if (base_ == nullptr) return;  // moved
    ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    munmap(base_, size_);
  }
  Guarded(Guarded&& from) : count_(from.count_), size_(from.size_), base_(from.base_), data_(from.data_) {
    from.base_ = nullptr;
  }

  T* data() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  static constexpr size_t kPage = 4096;
  int64_t count_;
  size_t size_;
  uint8_t* base_;
  T* data_;
};

// Numbers of one output, at one instruction set. tolerance 0: the same bits (or both NaN).
struct Output {
  std::string label;
  std::vector<double> values;
  double tolerance;
};

// One run of a case: makes buffers, draws numbers, collects outputs.
class Run {
 public:
  explicit Run(Edge edge) : edge_(edge) {}

  template <typename T>
  Guarded<T> buffer(int64_t count) const {
    return Guarded<T>(count, edge_);
  }

  template <typename T>
  void exact(const std::string& label, const Guarded<T>& out) {
    outputs.push_back({label, {out.begin(), out.end()}, 0});
  }
  // |a - b| <= tolerance * max(1, |b|)
  template <typename T>
  void close(const std::string& label, const Guarded<T>& out, double tolerance) {
    outputs.push_back({label, {out.begin(), out.end()}, tolerance});
  }

  Guarded<float> normals(int64_t count, float scale = 1.f) {
    Guarded<float> made(count, edge_);
    for (float& value : made) value = std::normal_distribution<float>()(random) * scale;
    return made;
  }
  // Weight codes from -limit to limit; every third matrix holds the limits alone.
  Guarded<int8_t> codes(int64_t count, int limit) {
    Guarded<int8_t> made(count, edge_);
    const bool is_extreme = random() % 3 == 0;
    for (int8_t& code : made) {
      const int drawn = static_cast<int>(random() % (2 * limit + 1)) - limit;
      code = static_cast<int8_t>(!is_extreme ? drawn : drawn < 0 ? -limit : limit);
    }
    return made;
  }
  // Rows of k floats, `stride` apart: plain, huge, zero, tiny, and (unless all must be finite) with a NaN or an infinity.
  Guarded<float> rows(int64_t m, int64_t k, int64_t stride, bool finite = false);

  std::mt19937 random{11};
  std::vector<Output> outputs;

 private:
  Edge edge_;
};

using CaseFn = void (*)(Run&);

// A static object of this type adds a case to the program.
struct Case {
  Case(const char* name, CaseFn run);
};

}  // namespace sanitize
