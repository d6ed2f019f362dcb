// Fused attention with no N x M buffer: keys and values of a head are packed into panels, then strips of query rows walk
// over blocks of keys with an online softmax. Few rows a head (decoding) read keys and values in place instead, in chunks
// of keys whose partial results are merged in order. Where work is cut never depends on the number of workers.
#include "attention.h"
#include "attention_table.h"
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

using namespace fxquant::attention;

namespace {

constexpr const Kernels* kTable[] = {&kScalar, &kAvx2, &kAvx2, &kAvx512};
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kScoreStride = kKeyBlock + 16;  // rows of scores do not share one set of the first-level cache
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kAloneProducts = 1 << 18;  // below it, waking a second thread costs more than it does

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) {
  void* p = std::aligned_alloc(64, (std::max<int64_t>(count, 1) * 4 + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(p));
}

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Job {
  const fxquant_attention_problem& p;
  const Kernels& kernel;
  int64_t groups, rows, heads, panel, keys_padded, values_padded, key_floats, value_floats;
  float factor;

  explicit Job(const fxquant_attention_problem& problem)
      : p(problem),
        kernel(*kTable[fxquant_isa()]),
        groups(p.heads / p.kv_heads),
        rows(groups * p.queries),
        heads(p.batch * p.kv_heads),
        panel(2 * kernel.lanes),
        keys_padded(up(p.keys, panel)),
        values_padded(up(p.value_depth, panel)),
        key_floats(keys_padded * p.depth),
        value_floats(values_padded * p.keys),
        factor(static_cast<float>(static_cast<double>(p.scale) * kLog2E)) {}

  int64_t limit(int64_t r) const { return p.causal ? std::min(r % p.queries + 1, p.keys) : p.keys; }
  int64_t scratch_floats(int64_t block) const {
    return std::min(block, rows) * (values_padded + 2) + kMostRows * (p.depth + 2 * kScoreStride);
  }
  int64_t chunks() const { return (p.keys + kDirectKeys - 1) / kDirectKeys; }
  int64_t partial_floats() const { return p.value_depth + 2; }
  int64_t direct_floats() const { return up(rows * p.depth, 16) + rows * kDirectKeys; }
};

// One strip of rows against one block of keys. `sums` holds the weighted values of earlier blocks.
struct Strip {
  int64_t r0, used;  // first row; keys of the block that some row sees
  bool is_even, is_last, is_only;
  float *scores, *sums, *top, *sum;
  Weights weights;
};

// One key head and the rows that read it: the query rows of `groups` query heads, one head after the other.
struct Head {
  const Job& job;
  const fxquant_attention_problem& p;
  const Kernels& kernel;
  int64_t batch, first;  // the first of its query heads
  const float *q, *k, *v;
  float* out;

  Head(const Job& of, int64_t index)
      : job(of),
        p(of.p),
        kernel(of.kernel),
        batch(index / p.kv_heads),
        first(index % p.kv_heads * of.groups),
        q(p.q + batch * p.q_stride[0] + first * p.q_stride[1]),
        k(p.k + batch * p.k_stride[0] + index % p.kv_heads * p.k_stride[1]),
        v(p.v + batch * p.v_stride[0] + index % p.kv_heads * p.v_stride[1]),
        out(p.out + batch * p.out_stride[0] + first * p.out_stride[1]) {}

  int64_t offset(int64_t r, const int64_t* stride) const {
    const int64_t g = job.groups == 1 ? 0 : r / p.queries;
    return g * stride[1] + (r - g * p.queries) * stride[2];
  }
  const float* query(int64_t r) const { return q + offset(r, p.q_stride); }
  float* output(int64_t r) const { return out + offset(r, p.out_stride); }
  // Whether rows [r, r + count) are the same distance apart in memory, and that distance.
  bool is_even(int64_t r, int64_t count) const {
    return job.groups == 1 || p.queries == 1 || r % p.queries + count <= p.queries;
  }
  int64_t step(const int64_t* stride) const { return stride[p.queries == 1 ? 1 : 2]; }

  void add_mask(int64_t r, int64_t from, int64_t count, float* s) const {
    if (p.mask_kind == FXQUANT_MASK_NONE) return;
    const int64_t* stride = p.mask_stride;
    const int64_t at = batch * stride[0] + first * stride[1] + offset(r, stride) + from * stride[3];
    if (p.mask_kind == FXQUANT_MASK_BOOL)
      kernel.hide(s, static_cast<const uint8_t*>(p.mask) + at, stride[3], count);
    else
      kernel.add_mask(s, static_cast<const float*>(p.mask) + at, stride[3], count);
  }

  void pack_key_panel(int64_t i, float* to) const {
    const int64_t j = i * job.panel;
    kernel.pack_keys(k + j * p.k_stride[2], p.k_stride[2], std::min(job.panel, p.keys - j), p.depth, job.factor,
                     to + j * p.depth);
  }
  void pack_value_rows(int64_t from, int64_t end, float* to) const {
    kernel.pack_values(v + from * p.v_stride[2], p.v_stride[2], end - from, p.value_depth, to + from * job.panel,
                       job.panel * p.keys);
  }

  void block(int64_t from, int64_t end, const float* keys, const float* values, float* scratch) const;
  bool score(Strip& strip, int64_t k0, const float* keys, float* copied, Weights* beside) const;
  void mix(Strip& strip, int64_t k0, const float* values) const;
  void direct(int64_t chunk, float* partial, float* scratch) const;
  void merge(float* partial) const;
  void finish(int64_t r, const float* from, float sum) const;
};

// A row whose keys are all masked away has sum 0 and output 0.
float inverse(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

void Head::finish(int64_t r, const float* from, float sum) const {
  float* to = output(r);
  const float by = inverse(sum);
  for (int64_t c = 0; c < p.value_depth; c++) to[c] = from[c] * by;
}

// Scores of a strip, while the weights of the strip before it are computed. False: its rows see none of the keys.
bool Head::score(Strip& strip, int64_t k0, const float* keys, float* copied, Weights* beside) const {
  Weights& w = strip.weights;
  int64_t own[kMostRows], seen = 0;
  for (int64_t r = 0; r < w.rows; r++) seen = std::max(seen, own[r] = job.limit(strip.r0 + r));
  strip.used = std::min(seen - k0, kKeyBlock);
  if (strip.used <= 0) return false;
  strip.is_even = is_even(strip.r0, w.rows);
  strip.is_last = seen <= k0 + kKeyBlock;
  strip.is_only = strip.is_last && k0 == 0;
  const float* rows = query(strip.r0);
  if (!strip.is_even) {
    for (int64_t r = 0; r < w.rows; r++) std::memcpy(copied + r * p.depth, query(strip.r0 + r), p.depth * 4);
    rows = copied;
  }
  w.scores = strip.scores, w.ld = kScoreStride;
  kernel.product[w.rows - 1](rows, strip.is_even ? step(p.q_stride) : p.depth, keys + k0 * p.depth, job.panel * p.depth,
                             strip.used, p.depth, strip.scores, kScoreStride, true, nullptr, beside);
  for (int64_t r = 0; r < w.rows; r++) {
    own[r] = std::clamp<int64_t>(own[r] - k0, 0, strip.used);
    add_mask(strip.r0 + r, k0, own[r], strip.scores + r * kScoreStride);
  }
  kernel.start_weights(w, own, strip.used, strip.top, strip.sum);
  return true;
}

// Weighted values of a strip; rows of one block go straight to their place.
void Head::mix(Strip& strip, int64_t k0, const float* values) const {
  const Weights& w = strip.weights;
  kernel.finish_weights(strip.weights, strip.sum);
  const int64_t panel = job.panel, width = job.values_padded;
  const ProductFn product = kernel.product[w.rows - 1];
  if (strip.is_only && strip.is_even && p.value_depth % kernel.lanes == 0) {
    float by[kMostRows];
    for (int64_t r = 0; r < w.rows; r++) by[r] = inverse(strip.sum[r]);
    product(strip.scores, kScoreStride, values, panel * p.keys, p.value_depth, strip.used, output(strip.r0),
            step(p.out_stride), true, by, nullptr);
    return;
  }
  for (int64_t r = 0; r < w.rows && k0 > 0; r++)
    if (w.factor[r] != 1.f)
      for (int64_t c = 0; c < width; c++) strip.sums[r * width + c] *= w.factor[r];
  product(strip.scores, kScoreStride, values + k0 * panel, panel * p.keys, p.value_depth, strip.used, strip.sums, width,
          k0 == 0, nullptr, nullptr);
  for (int64_t r = 0; r < w.rows && strip.is_last; r++) finish(strip.r0 + r, strip.sums + r * width, strip.sum[r]);
}

void Head::block(int64_t from, int64_t end, const float* keys, const float* values, float* scratch) const {
  const int64_t count = end - from, strips = (count + kernel.rows - 1) / kernel.rows, width = job.values_padded;
  float *sums = scratch, *top = sums + count * width, *sum = top + count, *copied = sum + count;
  float* scores = copied + kMostRows * p.depth;
  std::fill_n(top, count, kNone);
  std::fill_n(sum, count, 0.f);
  Strip slots[2];
  for (int64_t k0 = 0; k0 < p.keys; k0 += kKeyBlock) {
    Strip* waiting = nullptr;
    for (int64_t i = 0; i <= strips; i++) {
      Strip& strip = slots[i % 2];
      bool is_there = false;
      if (i < strips) {  // of about the same height: a strip of one or two rows wastes the multipliers
        const int64_t r = i * count / strips;
        strip.r0 = from + r, strip.weights.rows = (i + 1) * count / strips - r;
        strip.scores = scores + i % 2 * kMostRows * kScoreStride;
        strip.sums = sums + r * width, strip.top = top + r, strip.sum = sum + r;
        is_there = score(strip, k0, keys, copied, waiting == nullptr ? nullptr : &waiting->weights);
      }
      if (waiting != nullptr) mix(*waiting, k0, values);
      waiting = is_there ? &strip : nullptr;
    }
  }
}

// The partial result of every row of a head over one chunk of keys: max, sum, weighted values.
void Head::direct(int64_t chunk, float* partial, float* scratch) const {
  const int64_t k0 = chunk * kDirectKeys, size = job.partial_floats();
  int64_t own[kDirectRows], used = 0;
  float top[kDirectRows], sum[kDirectRows], *scores = scratch + up(job.rows * p.depth, 16);
  for (int64_t r = 0; r < job.rows; r++) {
    own[r] = std::clamp<int64_t>(job.limit(r) - k0, 0, kDirectKeys);
    used = std::max(used, own[r]);
    top[r] = kNone, sum[r] = 0.f;
    const float* row = query(r);
    for (int64_t c = 0; c < p.depth; c++) scratch[r * p.depth + c] = row[c] * job.factor;
  }
  kernel.dot_rows(scratch, job.rows, k + k0 * p.k_stride[2], p.k_stride[2], used, p.depth, scores, kDirectKeys);
  for (int64_t r = 0; r < job.rows; r++) add_mask(r, k0, own[r], scores + r * kDirectKeys);
  Weights weights;
  weights.scores = scores, weights.ld = kDirectKeys, weights.rows = job.rows;
  kernel.start_weights(weights, own, used, top, sum);
  kernel.finish_weights(weights, sum);
  kernel.mix_rows(scores, kDirectKeys, job.rows, v + k0 * p.v_stride[2], p.v_stride[2], used, p.value_depth, partial + 2, size);
  for (int64_t r = 0; r < job.rows; r++) partial[r * size] = top[r], partial[r * size + 1] = sum[r];
}

// The chunks of a head, in order, into the first of them.
void Head::merge(float* partial) const {
  const int64_t size = job.partial_floats(), stride = job.rows * size;
  for (int64_t r = 0; r < job.rows; r++, partial += size) {
    float top = kNone, total = 0.f;
    for (int64_t i = 0; i < job.chunks(); i++) top = std::max(top, partial[i * stride]);
    for (int64_t i = 0; i < job.chunks(); i++) {
      const float* from = partial + i * stride;
      const float by = from[0] == top || from[0] == kNone ? 1.f : std::exp2(from[0] - top);
      total += from[1] * by;
      if (i > 0 || by != 1.f)
        for (int64_t c = 2; c < size; c++) partial[c] = (i > 0 ? partial[c] : 0.f) + from[c] * by;
    }
    finish(r, partial + 2, total);
  }
}

// task(i, scratch) for 0 <= i < count, on workers that take the next one when they are done with theirs.
template <typename Task>
void share(int64_t count, int64_t workers, int64_t scratch, fxquant_parallel parallel, void* pool, Task task) {
  struct Context {
    std::atomic<int64_t> next;
    int64_t count, scratch;
    Task& task;
  } context{{0}, count, scratch, task};
  const auto body = [](void* given) {
    Context& c = *static_cast<Context*>(given);
    const auto memory = floats(c.scratch);
    for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.count;) c.task(i, memory.get());
  };
  if (workers <= 1 || count <= 1) return body(&context);
  parallel(pool, std::min(workers, count), body, &context);
}

// Few rows: chunks of keys are read where they are, and whoever finishes the last chunk of a head merges them in order.
void in_place(const Job& job, int64_t workers, fxquant_parallel parallel, void* pool) {
  const int64_t chunks = job.chunks(), size = job.rows * job.partial_floats(), own = job.direct_floats();
  if (chunks == 1)
    return share(job.heads, workers, own + size, parallel, pool, [&](int64_t i, float* scratch) {
      const Head head(job, i);
      head.direct(0, scratch + own, scratch);
      head.merge(scratch + own);
    });
  const auto partial = floats(job.heads * chunks * size);
  const auto done = std::make_unique<std::atomic<int64_t>[]>(job.heads);
  share(job.heads * chunks, workers, own, parallel, pool, [&](int64_t i, float* scratch) {
    const Head head(job, i / chunks);
    head.direct(i % chunks, partial.get() + i * size, scratch);
    if (done[i / chunks].fetch_add(1, std::memory_order_acq_rel) == chunks - 1)
      head.merge(partial.get() + i / chunks * chunks * size);
  });
}

}  // namespace

extern "C" void fxquant_attention(
    const fxquant_attention_problem* problem, int64_t workers, fxquant_parallel parallel, void* pool) {
  const Job job(*problem);
  if (job.rows == 0 || job.heads == 0) return;
  if (job.heads * job.rows * problem->keys * (problem->depth + problem->value_depth) < kAloneProducts) workers = 1;
  if (job.rows <= kDirectRows) return in_place(job, workers, parallel, pool);
  const int64_t packed = job.key_floats + job.value_floats, panels = job.keys_padded / job.panel;
  const int64_t tasks = (job.rows + kTaskRows - 1) / kTaskRows;
  const bool balanced = job.heads % workers == 0 || job.heads >= 4 * workers;
  if (balanced || tasks == 1) {  // a worker packs the heads that it computes
    share(job.heads, workers, packed + job.scratch_floats(kHeadRows), parallel, pool, [&](int64_t i, float* memory) {
      const Head head(job, i);
      float *keys = memory, *values = memory + job.key_floats;
      for (int64_t panel = 0; panel < panels; panel++) head.pack_key_panel(panel, keys);
      head.pack_value_rows(0, problem->keys, values);
      for (int64_t r = 0; r < job.rows; r += kHeadRows)
        head.block(r, std::min(r + kHeadRows, job.rows), keys, values, memory + packed);
    });
    return;
  }
  const auto shared = floats(job.heads * packed);
  share(job.heads * panels, workers, 0, parallel, pool, [&](int64_t i, float*) {
    const Head head(job, i / panels);
    const int64_t first = i % panels * job.panel;
    float* keys = shared.get() + i / panels * packed;
    head.pack_key_panel(i % panels, keys);
    head.pack_value_rows(first, std::min(first + job.panel, problem->keys), keys + job.key_floats);
  });
  share(job.heads * tasks, workers, job.scratch_floats(kTaskRows), parallel, pool, [&](int64_t i, float* scratch) {
    const int64_t head = i / tasks, r = (tasks - 1 - i % tasks) * kTaskRows;  // causal: the longest first
    const float* keys = shared.get() + head * packed;
    Head(job, head).block(r, std::min(r + kTaskRows, job.rows), keys, keys + job.key_floats, scratch);
  });
}
