// Quantized attention: the driver of attention.cpp with a product of codes in front. Keys are centred on their mean over
// all keys (a constant a row of scores, which softmax does not see), coded once a head and packed into panels; queries are
// coded once a block of rows. Where work is cut never depends on the number of workers.
#include "attention_int.h"
#include "attention_int_table.h"
#include "attention_table.h"
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

using namespace fxquant::attention;

namespace {

constexpr const Kernels* kFloats[] = {&kScalar, &kAvx2, &kAvx2, &kAvx512};
constexpr const IntKernels* kInts[] = {&kIntScalar, &kIntAvx2, &kIntAvxVnni, &kIntAvx512};
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kScoreStride = kKeyBlock + 16;  // rows of scores do not share one set of the first-level cache
constexpr int64_t kMostRows = 12;
constexpr int64_t kAloneProducts = 1 << 16;  // below it, waking a second thread costs more than it does
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kOnes[kPanelKeys] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

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

struct Job {
  const fxquant_attention_problem& p;
  const fxquant_attention_trace trace;
  const int32_t bits;
  const Kernels& floats;
  const IntKernels& ints;
  const Product& product;
  int64_t groups, rows, heads, panels, words, stride, values_padded;
  float factor;

  Job(const fxquant_attention_problem& problem, int32_t code_bits, const fxquant_attention_trace* wanted)
      : p(problem),
        trace(wanted == nullptr ? fxquant_attention_trace{} : *wanted),
        bits(code_bits),
        floats(*kFloats[fxquant_isa()]),
        ints(*kInts[fxquant_isa()]),
        product(bits == 6 ? ints.six : ints.eight),
        groups(p.heads / p.kv_heads),
        rows(groups * p.queries),
        heads(p.batch * p.kv_heads),
        panels((p.keys + kPanelKeys - 1) / kPanelKeys),
        words(product.words(p.depth)),
        stride(up(words * 4, 32)),
        values_padded(up(p.value_depth, floats.panel)),
        factor(static_cast<float>(static_cast<double>(p.scale) * kLog2E)) {}

  // What a key head is packed into.
  struct Head {
    float *mean, *key_scales, *values;
    uint8_t* panels;
  };
  Head head_of(Parts& parts) const {
    Head h;
    h.mean = parts.take<float>(p.depth);
    h.key_scales = parts.take<float>(panels * kPanelKeys);
    h.panels = parts.take<uint8_t>(panels * product.panel_bytes(words));
    h.values = parts.take<float>(values_padded * p.keys);
    return h;
  }
  // What a worker needs for a panel or a block of rows.
  struct Scratch {
    uint8_t* codes;
    float *work, *row_scales, *out, *top, *sum, *scores;
  };
  Scratch scratch_of(Parts& parts) const {
    Scratch s;
    s.codes = parts.take<uint8_t>(kRowBlock * stride);
    s.work = parts.take<float>(p.depth);
    s.row_scales = parts.take<float>(kRowBlock);
    s.out = parts.take<float>(kRowBlock * values_padded);
    s.top = parts.take<float>(kRowBlock);
    s.sum = parts.take<float>(kRowBlock);
    s.scores = parts.take<float>(kMostRows * kScoreStride);
    return s;
  }
  int64_t head_bytes() const {
    Parts parts{nullptr};
    head_of(parts);
    return parts.used;
  }
  int64_t scratch_bytes() const {
    Parts parts{nullptr};
    scratch_of(parts);
    return parts.used;
  }

  // Row r of key head `head`: the query rows of all the query heads that read it, one head after the other.
  int64_t batch_of(int64_t head) const { return head / p.kv_heads; }
  int64_t query_head(int64_t head, int64_t r) const { return head % p.kv_heads * groups + r / p.queries; }
  int64_t query_row(int64_t head, int64_t r) const {
    return (batch_of(head) * p.heads + query_head(head, r)) * p.queries + r % p.queries;
  }
  const float* query(int64_t head, int64_t r) const {
    return p.q + batch_of(head) * p.q_stride[0] + query_head(head, r) * p.q_stride[1] + r % p.queries * p.q_stride[2];
  }
  const float* key(int64_t head, int64_t j) const {
    return p.k + batch_of(head) * p.k_stride[0] + head % p.kv_heads * p.k_stride[1] + j * p.k_stride[2];
  }
  const float* value(int64_t head, int64_t j) const {
    return p.v + batch_of(head) * p.v_stride[0] + head % p.kv_heads * p.v_stride[1] + j * p.v_stride[2];
  }
  float* output(int64_t head, int64_t r) const {
    return p.out + batch_of(head) * p.out_stride[0] + query_head(head, r) * p.out_stride[1] +
           r % p.queries * p.out_stride[2];
  }
  int64_t limit(int64_t r) const { return p.causal ? std::min(r % p.queries + 1, p.keys) : p.keys; }
  int64_t blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }

  void find_mean(int64_t head, float* mean) const;
  void pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const;
  void pack_values(int64_t head, int64_t from, int64_t end, float* to) const;
  void add_mask(int64_t head, int64_t r, int64_t first, int64_t count, float* s) const;
  void code_queries(int64_t head, int64_t first, int64_t count, const Scratch& scratch) const;
  void score(int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch) const;
  void trace_sums(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from,
                  const Scratch& scratch) const;
  void strip(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, const Head& from,
             const Scratch& scratch) const;
  void block(int64_t head, int64_t index, const Head& from, const Scratch& scratch) const;
};

void copy_codes(const uint8_t* from, int64_t count, int64_t code_bytes, int32_t offset, int8_t* to) {
  for (int64_t c = 0; c < count; c++) to[c] = static_cast<int8_t>(from[c * code_bytes] - offset);
}

// Values that are not finite count as 0: they show in their own key alone. A mean that overflows is 0.
void Job::find_mean(int64_t head, float* mean) const {
  ints.sum_keys(key(head, 0), p.k_stride[2], p.keys, p.depth, mean);
  for (int64_t c = 0; c < p.depth; c++) {
    if (!std::isfinite(mean[c])) {
      mean[c] = 0.f;
      for (int64_t j = 0; j < p.keys; j++) {
        const float value = key(head, j)[c];
        mean[c] += std::isfinite(value) ? value : 0.f;
      }
    }
    mean[c] = std::isfinite(mean[c]) ? mean[c] / static_cast<float>(p.keys) : 0.f;
  }
}

void Job::pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const {
  const int64_t first = i * kPanelKeys, count = std::min(kPanelKeys, p.keys - first);
  for (int64_t j = 0; j < count; j++) {
    uint8_t* codes = scratch.codes + j * stride;
    const float scale = ints.quantize(key(head, first + j), to.mean, p.depth, bits, 0, product.code_bytes, scratch.work, codes);
    to.key_scales[first + j] = scale;
    const int64_t row = head * p.keys + first + j;
    if (trace.k_scales != nullptr) trace.k_scales[row] = scale;
    if (trace.k_codes != nullptr) copy_codes(codes, p.depth, product.code_bytes, 0, trace.k_codes + row * p.depth);
  }
  for (int64_t j = count; j < kPanelKeys; j++) {
    std::memset(scratch.codes + j * stride, 0, words * 4);
    to.key_scales[first + j] = 0.f;
  }
  uint8_t* panel = to.panels + i * product.panel_bytes(words);
  ints.pack(scratch.codes, stride, words, panel + product.start_bytes(words));
  if (product.start != nullptr) product.start(panel, words);
}

void Job::pack_values(int64_t head, int64_t from, int64_t end, float* to) const {
  for (int64_t c = 0; c < p.value_depth; c += floats.panel) {
    const int64_t width = std::min(floats.panel, p.value_depth - c);
    for (int64_t j = from; j < end; j++) {
      float* row = to + c * p.keys + j * floats.panel;
      std::memcpy(row, value(head, j) + c, width * 4);
      std::memset(row + width, 0, (floats.panel - width) * 4);
    }
  }
}

// s[j] += log2(e) mask[j]. A finite mask stays finite, so that a row of the lowest float is uniform, not empty.
void Job::add_mask(int64_t head, int64_t r, int64_t first, int64_t count, float* s) const {
  if (p.mask_kind == FXQUANT_MASK_NONE) return;
  const int64_t step = p.mask_stride[3];
  const int64_t offset = batch_of(head) * p.mask_stride[0] + query_head(head, r) * p.mask_stride[1] +
                         r % p.queries * p.mask_stride[2] + first * step;
  if (p.mask_kind == FXQUANT_MASK_BOOL) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + offset;
    for (int64_t j = 0; j < count; j++) s[j] += mask[j * step] ? 0.f : kNone;
    return;
  }
  const float* mask = static_cast<const float*>(p.mask) + offset;
  const auto add = [](float score, float m) {
    const float base2 = m * static_cast<float>(kLog2E);
    return score + (m >= -FLT_MAX && base2 < -FLT_MAX ? -FLT_MAX : base2);
  };
  if (step == 1)
    for (int64_t j = 0; j < count; j++) s[j] = add(s[j], mask[j]);
  else
    for (int64_t j = 0; j < count; j++) s[j] = add(s[j], mask[j * step]);
}

void Job::code_queries(int64_t head, int64_t first, int64_t count, const Scratch& scratch) const {
  for (int64_t r = 0; r < count; r++) {
    uint8_t* codes = scratch.codes + r * stride;
    const float scale = ints.quantize(query(head, first + r), nullptr, p.depth, bits, product.offset, product.code_bytes,
                                      scratch.work, codes);
    scratch.row_scales[r] = scale * factor;
    const int64_t row = query_row(head, first + r);
    if (trace.q_scales != nullptr) trace.q_scales[row] = scale;
    if (trace.q_codes != nullptr) copy_codes(codes, p.depth, product.code_bytes, product.offset, trace.q_codes + row * p.depth);
  }
}

void Job::score(int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch) const {
  const int64_t bytes_a_panel = product.panel_bytes(words);
  for (int64_t j = 0; j < used; j += kPanelKeys)
    for (int64_t i = 0; i < count; i += ints.rows)
      product.tiles[std::min(ints.rows, count - i) - 1](
          scratch.codes + (r + i) * stride, stride, from.panels + (k0 + j) / kPanelKeys * bytes_a_panel, words,
          scratch.row_scales + r + i, from.key_scales + k0 + j, scratch.scores + i * kScoreStride + j, kScoreStride);
}

// The same tiles with scales of 1: their float32 results are the integer sums.
void Job::trace_sums(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from,
                     const Scratch& scratch) const {
  const int64_t bytes_a_panel = product.panel_bytes(words);
  float sums[kPanelKeys];
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < used; j += kPanelKeys) {
      product.tiles[0](scratch.codes + (r + i) * stride, stride, from.panels + (k0 + j) / kPanelKeys * bytes_a_panel, words,
                       kOnes, kOnes, sums, kPanelKeys);
      int32_t* to = trace.sums + query_row(head, first + r + i) * p.keys + k0 + j;
      for (int64_t c = 0; c < std::min(kPanelKeys, used - j); c++) to[c] = static_cast<int32_t>(sums[c]);
    }
}

// One strip of rows, from row r of the block that starts at `first`, against one block of keys.
void Job::strip(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, const Head& from,
                const Scratch& scratch) const {
  int64_t seen = 0;
  for (int64_t i = 0; i < count; i++) seen = std::max(seen, limit(first + r + i));
  const int64_t used = std::min(seen - k0, kKeyBlock);
  if (used <= 0) return;
  if (trace.sums != nullptr) trace_sums(head, first, r, count, k0, used, from, scratch);
  score(r, count, k0, used, from, scratch);
  float* out = scratch.out + r * values_padded;
  for (int64_t i = 0; i < count; i++) {
    float* s = scratch.scores + i * kScoreStride;
    const int64_t own = std::clamp<int64_t>(limit(first + r + i) - k0, 0, used);
    add_mask(head, first + r + i, k0, own, s);
    const float by = floats.softmax(s, own, up(used, floats.panel), scratch.top + r + i, scratch.sum + r + i);
    if (k0 > 0 && by != 1.f)
      for (int64_t c = 0; c < values_padded; c++) out[i * values_padded + c] *= by;
  }
  for (int64_t c = 0; c < p.value_depth; c += floats.panel)
    (p.value_depth - c > floats.panel / 2 ? floats.wide : floats.narrow)[count - 1](
        scratch.scores, kScoreStride, from.values + c * p.keys + k0 * floats.panel, floats.panel, used, out + c,
        values_padded, k0 == 0);
}

void Job::block(int64_t head, int64_t index, const Head& from, const Scratch& scratch) const {
  const int64_t first = index * kRowBlock, count = std::min(kRowBlock, rows - first);
  code_queries(head, first, count, scratch);
  std::fill_n(scratch.top, count, kNone);
  std::fill_n(scratch.sum, count, 0.f);
  for (int64_t k0 = 0; k0 < p.keys; k0 += kKeyBlock)
    for (int64_t r = 0; r < count;) {
      const int64_t left = count - r, most = floats.rows;
      const int64_t height = left >= 2 * most ? most : left > most ? (left + 1) / 2 : left;
      strip(head, first, r, height, k0, from, scratch);
      r += height;
    }
  for (int64_t r = 0; r < count; r++) {  // a row whose keys are all masked away has sum 0 and output 0
    const float by = scratch.sum[r] == 0.f ? 0.f : 1.f / scratch.sum[r];
    float* to = output(head, first + r);
    for (int64_t c = 0; c < p.value_depth; c++) to[c] = scratch.out[r * values_padded + c] * by;
  }
}

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

extern "C" void fxquant_attention_int(const fxquant_attention_problem* problem, int32_t qk_bits, int32_t pv_bits,
                                      const fxquant_attention_trace* trace, int64_t workers, fxquant_parallel parallel,
                                      void* pool) {
  const Job job(*problem, qk_bits, trace);
  if (job.rows == 0 || job.heads == 0) return;
  if (job.heads * job.rows * problem->keys * (problem->depth + problem->value_depth) < kAloneProducts) workers = 1;
  const int64_t head_bytes = job.head_bytes(), scratch_bytes = job.scratch_bytes();
  const bool balanced = job.heads % workers == 0 || job.heads >= 4 * workers;
  if (balanced || job.blocks() == 1) {  // a worker packs the heads that it computes
    share(job.heads, workers, head_bytes + scratch_bytes, parallel, pool, [&](int64_t head, uint8_t* memory) {
      Parts parts{memory};
      const Job::Head packed = job.head_of(parts);
      const Job::Scratch scratch = job.scratch_of(parts);
      job.find_mean(head, packed.mean);
      for (int64_t i = 0; i < job.panels; i++) job.pack_keys(head, i, packed, scratch);
      job.pack_values(head, 0, problem->keys, packed.values);
      for (int64_t i = 0; i < job.blocks(); i++) job.block(head, i, packed, scratch);
    });
    return;
  }
  const auto shared = bytes(job.heads * head_bytes);
  const auto head_at = [&](int64_t head) {
    Parts parts{shared.get() + head * head_bytes};
    return job.head_of(parts);
  };
  share(job.heads, workers, 0, parallel, pool, [&](int64_t head, uint8_t*) { job.find_mean(head, head_at(head).mean); });
  share(job.heads * job.panels, workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    const int64_t head = i / job.panels, first = i % job.panels * kPanelKeys;
    const Job::Head packed = head_at(head);
    job.pack_keys(head, i % job.panels, packed, job.scratch_of(parts));
    job.pack_values(head, first, std::min(first + kPanelKeys, problem->keys), packed.values);
  });
  share(job.heads * job.blocks(), workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    const int64_t head = i / job.blocks(), last = job.blocks() - 1;
    job.block(head, last - i % job.blocks(), head_at(head), job.scratch_of(parts));  // causal: the longest first
  });
}
