// Aligned memory of a worker, and tasks that workers take one after the other.
#pragma once
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fxquant::attention {
namespace {

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t[], Free>;

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

Bytes bytes(int64_t count) {
  void* p = std::aligned_alloc(64, up(std::max<int64_t>(count, 1), 64));
  if (p == nullptr) throw std::bad_alloc();
  return Bytes(static_cast<uint8_t*>(p));
}

// Hands out aligned parts of one block of memory, or (from null) only counts them.
struct Parts {
  uint8_t* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

// task(i, memory) for 0 <= i < count, on workers that take the next one when they are done with theirs.
template <typename Task>
void share(int64_t count, int64_t workers, int64_t size, fxquant_parallel parallel, void* pool, Task task) {
  struct Context {
    std::atomic<int64_t> next;
    int64_t count, size;
    Task& task;
  } context{{0}, count, size, task};
  const auto body = [](void* given) {
    Context& c = *static_cast<Context*>(given);
    const auto memory = bytes(c.size);
    for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.count;) c.task(i, memory.get());
  };
  if (workers <= 1 || count <= 1) return body(&context);
  parallel(pool, std::min(workers, count), body, &context);
}

}  // namespace
}  // namespace fxquant::attention
