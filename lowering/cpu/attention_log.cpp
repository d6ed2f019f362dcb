// Attention with logarithmic codes of its weights, straight from the scores. Keys and values of a head are coded and packed
// into panels, then strips of query rows get their scores over all keys, the codes of their weights, and their sums. Codes are
// whole numbers in float32 and their sums stay below 2^24: the products of the float kernels are exact on them. Small codes of
// q and k take the product of 6-bit codes, which is faster. Where work is cut never depends on the number of workers.
#include "attention_log.h"
#include "attention_int_table.h"
#include "attention_log_planes.h"
#include "attention_log_table.h"
#include "attention_mask.h"
#include "attention_share.h"
#include "attention_table.h"
#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

using namespace fxquant::attention;

namespace {

constexpr const Kernels* kFloats[] = {&kScalar, &kAvx2, &kAvx2, &kAvx512};
constexpr const LogKernels* kLogs[] = {&kLogScalar, &kLogAvx2, &kLogAvx2, &kLogAvx512};
constexpr const IntKernels* kInts[] = {&kIntScalar, &kIntAvx2, &kIntAvxVnni, &kIntAvx512};
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kRowBlock = 96;            // rows of a task
constexpr int64_t kAloneProducts = 1 << 16;  // below it, waking a second thread costs more than it does
static_assert(kMostTables == 2 * kMostGroups);
constexpr int64_t kPad = 16;                 // rows of scores do not share one set of the first-level cache

struct Job {
  const fxquant_attention_problem& p;
  const fxquant_log_attention& format;
  const fxquant_log_trace trace;
  const Kernels& floats;
  const LogKernels& logs;
  const IntKernels& ints;
  const Planes planes;
  const Product* small;  // of q and k; null: that of the float kernels
  int64_t groups, heads, panel, panels, stride, values_padded, words, byte_stride;

  Job(const fxquant_attention_problem& problem, const fxquant_log_attention& given, const fxquant_log_trace* wanted)
      : p(problem),
        format(given),
        trace(wanted == nullptr ? fxquant_log_trace{} : *wanted),
        floats(*kFloats[fxquant_isa()]),
        logs(*kLogs[fxquant_isa()]),
        ints(*kInts[fxquant_isa()]),
        planes(planes_of(p, format)),
        small(is_coded() && std::max(largest_code(format.q, p.heads, 0), largest_code(format.k, p.kv_heads, 0)) <= top_code(6)
                  ? &ints.six
                  : nullptr),
        groups(p.heads / p.kv_heads),
        heads(p.batch * p.kv_heads),
        panel(2 * floats.lanes),
        panels((p.keys + panel - 1) / panel),
        stride(panels * panel + kPad),
        values_padded(up(p.value_depth, panel)),
        words(ints.six.words(p.depth)),
        byte_stride(up(words * 4, 32)) {}

  // Scale and limits of the codes of a row.
  struct Bounds {
    float *scale, *low, *high;
  };
  // What a key head is packed into: keys as floats, or as small codes with a scale of 1, NaN where there is one.
  struct Head {
    Bounds key_bounds, value_bounds;
    float *keys, *key_scales, *values, *value_scales;
    uint8_t* codes;
  };
  // What a worker needs for a panel or a block of rows.
  struct Scratch {
    Bounds bounds;
    float *rows, *row_scales, *scores, *others, *sums;
    uint8_t* bytes;
    int32_t* codes;
  };
  Bounds bounds_of(Parts& parts, int64_t width) const {
    const int64_t padded = up(width, panel);
    return {parts.take<float>(padded), parts.take<float>(padded), parts.take<float>(padded)};
  }
  Head head_of(Parts& parts) const {
    Head h;
    h.key_bounds = bounds_of(parts, p.depth), h.value_bounds = bounds_of(parts, p.value_depth);
    h.keys = parts.take<float>(small == nullptr ? panels * panel * p.depth : 0);
    h.key_scales = parts.take<float>(small == nullptr ? 0 : panels * panel);
    h.codes = parts.take<uint8_t>(small == nullptr ? 0 : panels * panel / kPanelKeys * small->panel_bytes(words));
    h.values = parts.take<float>(values_padded * p.keys);
    h.value_scales = parts.take<float>(values_padded);
    return h;
  }
  Scratch scratch_of(Parts& parts) const {
    Scratch s;
    s.bounds = bounds_of(parts, p.depth);
    s.row_scales = parts.take<float>(kRowBlock);
    s.bytes = parts.take<uint8_t>(small == nullptr ? 0 : kRowBlock * byte_stride);
    s.rows = parts.take<float>(std::max(kRowBlock * p.depth, panel * std::max(p.depth, p.value_depth)));
    s.scores = parts.take<float>(kMostRows * stride);
    s.others = parts.take<float>((planes.count - 1) * kMostRows * stride);
    s.sums = parts.take<float>(planes.count * kMostRows * values_padded);
    s.codes = parts.take<int32_t>(stride);
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

  bool is_coded() const { return format.q.scale != nullptr; }
  int64_t batch_of(int64_t head) const { return head / p.kv_heads; }
  const float* query(int64_t head, int64_t h, int64_t i) const {
    return p.q + batch_of(head) * p.q_stride[0] + h * p.q_stride[1] + i * p.q_stride[2];
  }
  const float* key(int64_t head, int64_t j) const {
    return p.k + batch_of(head) * p.k_stride[0] + head % p.kv_heads * p.k_stride[1] + j * p.k_stride[2];
  }
  const float* value(int64_t head, int64_t j) const {
    return p.v + batch_of(head) * p.v_stride[0] + head % p.kv_heads * p.v_stride[1] + j * p.v_stride[2];
  }
  float* output(int64_t head, int64_t h, int64_t i) const {
    return p.out + batch_of(head) * p.out_stride[0] + h * p.out_stride[1] + i * p.out_stride[2];
  }
  int64_t limit(int64_t i) const { return p.causal ? std::min(i + 1, p.keys) : p.keys; }
  int64_t blocks() const { return (p.queries + kRowBlock - 1) / kRowBlock; }
  int64_t block_of(int64_t h) const { return h * format.p.head_step; }
  // The number of a row in a trace.
  int64_t row(int64_t head, int64_t h, int64_t i) const { return (batch_of(head) * p.heads + h) * p.queries + i; }

  void set_bounds(const fxquant_uniform_codes& codes, int64_t head, int64_t width, const Bounds& to) const;
  void prepare(int64_t head, const Head& to) const;
  void pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const;
  void pack_small(int64_t first, const float* rows, const Head& to, const Scratch& scratch) const;
  void pack_values(int64_t head, int64_t from, int64_t end, const Head& to, const Scratch& scratch) const;
  float factor_of(int64_t head, int64_t h) const;
  float weigh(int64_t head, int64_t h, int64_t i, int64_t used, float* s, const Scratch& scratch, uint32_t& in_use) const;
  void score(int64_t r, int64_t count, const float* rows, int64_t ld, int64_t used, const Head& from,
             const Scratch& scratch) const;
  void strip(int64_t head, int64_t h, int64_t first, int64_t r, int64_t count, const float* rows, int64_t ld, const Head& from,
             const Scratch& scratch) const;
  void finish(int64_t head, int64_t h, int64_t i, const float* sums, float lse, const Head& from) const;
  void block(int64_t head, int64_t h, int64_t first, const Head& from, const Scratch& scratch) const;
};

// Codes less their zero point lie between low and high. What fills the last vector codes 0 as 0.
void Job::set_bounds(const fxquant_uniform_codes& codes, int64_t head, int64_t width, const Bounds& to) const {
  const float top = static_cast<float>(codes.top);
  for (int64_t c = 0; c < up(width, panel); c++) {
    const int64_t at = head * codes.head_step + c * codes.channel_step;
    const bool is_there = c < width;
    to.scale[c] = is_there ? codes.scale[at] : 1.f;
    to.low[c] = !is_there ? 0.f : codes.zero_point == nullptr ? -top : -codes.zero_point[at];
    to.high[c] = !is_there ? 0.f : codes.zero_point == nullptr ? top : top - codes.zero_point[at];
  }
}

void Job::prepare(int64_t head, const Head& to) const {
  if (is_coded()) set_bounds(format.k, head % p.kv_heads, p.depth, to.key_bounds);
  set_bounds(format.v, head % p.kv_heads, p.value_depth, to.value_bounds);
  std::copy_n(to.value_bounds.scale, values_padded, to.value_scales);
}

// NaN among rows of codes becomes 0, and the scale of its row NaN.
void scrub(float* rows, int64_t count, int64_t width, float* scales) {
  for (int64_t at = 0; at < count * width; at++)
    if (std::isnan(rows[at])) rows[at] = 0.f, scales[at / width] = std::numeric_limits<float>::quiet_NaN();
}

// One panel of keys as small codes; keys that are missing have codes 0.
void Job::pack_small(int64_t first, const float* rows, const Head& to, const Scratch& scratch) const {
  const int64_t count = std::clamp<int64_t>(p.keys - first, 0, kPanelKeys);
  ints.encode(rows, count, p.depth, {6, 0, small->code_bytes}, scratch.bytes, byte_stride);
  for (int64_t j = count; j < kPanelKeys; j++) std::memset(scratch.bytes + j * byte_stride, 0, words * 4);
  uint8_t* codes = to.codes + first / kPanelKeys * small->panel_bytes(words);
  ints.pack(scratch.bytes, byte_stride, words, codes + small->start_bytes(words));
  if (small->start != nullptr) small->start(codes, words);
}

void Job::pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const {
  const int64_t first = i * panel, count = std::min(panel, p.keys - first);
  const Bounds& bounds = to.key_bounds;
  const float* rows = key(head, first);
  if (!is_coded()) return floats.pack_keys(rows, p.k_stride[2], count, p.depth, 1.f, to.keys + first * p.depth);
  const bool has_nan = logs.code_rows(rows, p.k_stride[2], count, p.depth, bounds.scale, bounds.low, bounds.high, scratch.rows);
  if (small == nullptr) return floats.pack_keys(scratch.rows, p.depth, count, p.depth, 1.f, to.keys + first * p.depth);
  std::fill_n(to.key_scales + first, panel, 1.f);
  if (has_nan) scrub(scratch.rows, count, p.depth, to.key_scales + first);
  for (int64_t j = 0; j < panel; j += kPanelKeys) pack_small(first + j, scratch.rows + j * p.depth, to, scratch);
}

// The values of at most a panel of keys. A NaN counts as 0 and makes its channel NaN, whatever its weight.
void Job::pack_values(int64_t head, int64_t from, int64_t end, const Head& to, const Scratch& scratch) const {
  const int64_t count = end - from, width = p.value_depth;
  const Bounds& bounds = to.value_bounds;
  const bool has_nan =
      logs.code_rows(value(head, from), p.v_stride[2], count, width, bounds.scale, bounds.low, bounds.high, scratch.rows);
  for (int64_t at = 0; has_nan && at < count * width; at++)
    if (std::isnan(scratch.rows[at])) {
      scratch.rows[at] = 0.f;
      const std::atomic_ref<float> value_scale(to.value_scales[at % width]);  // workers may share a head
      value_scale.store(std::numeric_limits<float>::quiet_NaN(), std::memory_order_relaxed);
    }
  floats.pack_values(scratch.rows, width, count, width, to.values + from * panel, p.keys * panel);
}

float Job::factor_of(int64_t head, int64_t h) const {
  double factor = static_cast<double>(p.scale) * kLog2E;
  if (is_coded())
    factor = factor * format.q.scale[h * format.q.head_step] * format.k.scale[head % p.kv_heads * format.k.head_step];
  return static_cast<float>(factor);
}

// Scores of one row become its weights in every plane: those of plane 0 in their place. Returns lse; adds the planes in use.
float Job::weigh(int64_t head, int64_t h, int64_t i, int64_t used, float* s, const Scratch& scratch, uint32_t& in_use) const {
  const int64_t own = std::min(limit(i), used), padded = up(used, 16), at = block_of(h), of = row(head, h, i);
  add_mask(p, batch_of(head), h, i, 0, own, s);
  const LogSum sum = logs.sum(s, own, padded);
  const double shift = std::isinf(sum.largest) && sum.largest < 0 ? 0. : static_cast<double>(sum.largest);
  const float lse = sum.sum == 0.f ? std::numeric_limits<float>::infinity()
                                   : static_cast<float>(shift + std::log2(static_cast<double>(sum.sum)) + planes.shifts[at]);
  if (trace.scores != nullptr) std::copy_n(s, own, trace.scores + of * p.keys);
  if (trace.lse != nullptr) trace.lse[of] = lse;
  int32_t* codes = trace.codes == nullptr ? nullptr : scratch.codes;
  const LogRow how{lse, planes.factors[at], static_cast<float>(format.p.codes)};
  const LogTables tables{planes.table(at, 0), planes.count, planes.size};
  in_use |= logs.weigh(s, padded, how, tables, scratch.others + (s - scratch.scores), kMostRows * stride, codes);
  for (int64_t j = 0; codes != nullptr && j < own; j++) trace.codes[of * p.keys + j] = static_cast<int16_t>(codes[j]);
  return lse;
}

// Scores of rows r to r + count of a block against `used` keys; `rows` are theirs where codes are not small.
void Job::score(int64_t r, int64_t count, const float* rows, int64_t ld, int64_t used, const Head& from,
                const Scratch& scratch) const {
  const float* scales = scratch.row_scales + r;
  if (small == nullptr)
    return floats.product[count - 1](rows, ld, from.keys, panel * p.depth, used, p.depth, scratch.scores, stride, true, scales,
                                     nullptr);
  for (int64_t j = 0; j < used; j += kPanelKeys)
    for (int64_t i = 0; i < count; i += ints.rows)
      small->tiles[std::min(ints.rows, count - i) - 1](
          scratch.bytes + (r + i) * byte_stride, byte_stride, from.codes + j / kPanelKeys * small->panel_bytes(words), words,
          scales + i, from.key_scales + j, scratch.scores + i * stride + j, stride);
}

// One strip of rows of query head h from row r of the block that starts at `first`.
void Job::strip(int64_t head, int64_t h, int64_t first, int64_t r, int64_t count, const float* rows, int64_t ld, const Head& from,
                const Scratch& scratch) const {
  const int64_t i = first + r, used = limit(i + count - 1), plane_sums = kMostRows * values_padded;
  float lse[kMostRows];
  score(r, count, rows, ld, used, from, scratch);
  uint32_t in_use = 0;
  for (int64_t n = 0; n < count; n++) lse[n] = weigh(head, h, i + n, used, scratch.scores + n * stride, scratch, in_use);
  for (int64_t plane = 0; plane < planes.count; plane++) {
    const float* weights = plane == 0 ? scratch.scores : scratch.others + (plane - 1) * kMostRows * stride;
    float* sums = scratch.sums + plane * plane_sums;
    if (in_use >> plane & 1)
      floats.product[count - 1](weights, stride, from.values, panel * p.keys, p.value_depth, used, sums, values_padded, true,
                                nullptr, nullptr);
    else
      std::fill_n(sums, count * values_padded, 0.f);
  }
  for (int64_t n = 0; n < count; n++) finish(head, h, i + n, scratch.sums + n * values_padded, lse[n], from);
}

void Job::finish(int64_t head, int64_t h, int64_t i, const float* sums, float lse, const Head& from) const {
  float* to = output(head, h, i);
  const float* units = planes.units.data() + block_of(h) * planes.count;
  logs.finish(sums, kMostRows * values_padded, units, planes.count, from.value_scales, p.value_depth, to);
  if (std::isnan(lse)) std::fill_n(to, p.value_depth, lse);
  for (int64_t plane = 0; plane < planes.count && trace.sums != nullptr; plane++)
    std::copy_n(sums + plane * kMostRows * values_padded, p.value_depth,
                trace.sums + (plane * p.batch * p.heads * p.queries + row(head, h, i)) * p.value_depth);
}

void Job::block(int64_t head, int64_t h, int64_t first, const Head& from, const Scratch& scratch) const {
  const int64_t count = std::min(kRowBlock, p.queries - first), strips = (count + floats.rows - 1) / floats.rows;
  const float* rows = query(head, h, first);
  int64_t ld = p.q_stride[2];
  std::fill_n(scratch.row_scales, count, factor_of(head, h));
  if (is_coded()) {
    const Bounds& bounds = scratch.bounds;
    set_bounds(format.q, h, p.depth, bounds);
    const bool has_nan = logs.code_rows(rows, ld, count, p.depth, bounds.scale, bounds.low, bounds.high, scratch.rows);
    rows = scratch.rows, ld = p.depth;
    if (small != nullptr) {
      if (has_nan) scrub(scratch.rows, count, p.depth, scratch.row_scales);
      ints.encode(rows, count, p.depth, {6, small->offset, small->code_bytes}, scratch.bytes, byte_stride);
    }
  }
  for (int64_t n = 0; n < strips; n++) {  // of about the same height: a strip of one or two rows wastes the multipliers
    const int64_t r = n * count / strips, end = (n + 1) * count / strips;
    strip(head, h, first, r, end - r, rows + r * ld, ld, from, scratch);
  }
}

}  // namespace

extern "C" int64_t fxquant_attention_log_planes(const fxquant_attention_problem* problem, const fxquant_log_attention* format) {
  return planes_of(*problem, *format).count;
}

extern "C" void fxquant_attention_log(const fxquant_attention_problem* problem, const fxquant_log_attention* format,
                                      const fxquant_log_trace* trace, int64_t workers, fxquant_parallel parallel, void* pool) {
  const fxquant_attention_problem& p = *problem;
  if (p.batch * p.heads * p.queries == 0) return;
  const Job job(p, *format, trace);
  if (p.batch * p.heads * p.queries * p.keys * (p.depth + p.value_depth) < kAloneProducts) workers = 1;
  const int64_t head_bytes = job.head_bytes(), scratch_bytes = job.scratch_bytes(), blocks = job.groups * job.blocks();
  const auto pack = [&](int64_t head, int64_t i, const Job::Head& to, const Job::Scratch& scratch) {
    job.pack_keys(head, i, to, scratch);
    job.pack_values(head, i * job.panel, std::min((i + 1) * job.panel, p.keys), to, scratch);
  };
  const auto run = [&](int64_t head, int64_t i, const Job::Head& from, const Job::Scratch& scratch) {
    const int64_t h = head % p.kv_heads * job.groups + i / job.blocks();
    job.block(head, h, i % job.blocks() * kRowBlock, from, scratch);
  };
  const bool balanced = job.heads % workers == 0 || job.heads >= 4 * workers;
  if (balanced || blocks == 1) {  // a worker packs the heads that it computes
    share(job.heads, workers, head_bytes + scratch_bytes, parallel, pool, [&](int64_t head, uint8_t* memory) {
      Parts parts{memory};
      const Job::Head packed = job.head_of(parts);
      const Job::Scratch scratch = job.scratch_of(parts);
      job.prepare(head, packed);
      for (int64_t i = 0; i < job.panels; i++) pack(head, i, packed, scratch);
      for (int64_t i = 0; i < blocks; i++) run(head, i, packed, scratch);
    });
    return;
  }
  const auto shared = bytes(job.heads * head_bytes);
  const auto head_at = [&](int64_t head) {
    Parts parts{shared.get() + head * head_bytes};
    return job.head_of(parts);
  };
  for (int64_t head = 0; head < job.heads; head++) job.prepare(head, head_at(head));
  share(job.heads * job.panels, workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    pack(i / job.panels, i % job.panels, head_at(i / job.panels), job.scratch_of(parts));
  });
  share(job.heads * blocks, workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    run(i / blocks, blocks - 1 - i % blocks, head_at(i / blocks), job.scratch_of(parts));  // causal: the longest first
  });
}
