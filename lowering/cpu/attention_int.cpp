// Quantized attention: the driver of attention.cpp with a product of codes in front. Keys are centred on their mean over
// all keys (a constant a row of scores, which softmax does not see), coded once a head and packed into panels; queries are
// coded once a block of rows. Where work is cut never depends on the number of workers.
#include "attention_int.h"
#include "attention_int_table.h"
#include "attention_mask.h"
#include "attention_share.h"
#include "attention_table.h"
#include "isa.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

using namespace fxquant::attention;

namespace {

constexpr const Kernels* kFloats[] = {&kScalar, &kAvx2, &kAvx2, &kAvx512};
constexpr const IntKernels* kInts[] = {&kIntScalar, &kIntAvx2, &kIntAvxVnni, &kIntAvx512};
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kScoreStride = kKeyBlock + 16;  // rows of scores do not share one set of the first-level cache
constexpr int64_t kWeightStride = kKeyBlock * 2 + 64;
constexpr int64_t kRowBlock = 96;  // rows of a task
constexpr int64_t kAloneProducts = 1 << 16;  // below it, waking a second thread costs more than it does
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kOnes[kPanelKeys] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

struct Job {
  const fxquant_attention_problem& p;
  const fxquant_attention_trace trace;
  const int32_t bits;
  const bool is_mixed;  // weights and values are coded too
  const Kernels& floats;
  const IntKernels& ints;
  const Product& product;
  int64_t groups, rows, heads, panels, words, stride, values_padded, value_words;
  float factor;

  Job(const fxquant_attention_problem& problem, int32_t qk_bits, int32_t pv_bits, const fxquant_attention_trace* wanted)
      : p(problem),
        trace(wanted == nullptr ? fxquant_attention_trace{} : *wanted),
        bits(qk_bits),
        is_mixed(pv_bits != 0),
        floats(*kFloats[fxquant_isa()]),
        ints(*kInts[fxquant_isa()]),
        product(bits == 6 ? ints.six : ints.eight),
        groups(p.heads / p.kv_heads),
        rows(groups * p.queries),
        heads(p.batch * p.kv_heads),
        panels((p.keys + kPanelKeys - 1) / kPanelKeys),
        words(product.words(p.depth)),
        stride(up(words * 4, 32)),
        values_padded(up(p.value_depth, panel())),
        value_words(up(p.keys, ints.mixture.keys_a_word()) / ints.mixture.keys_a_word()),
        factor(static_cast<float>(static_cast<double>(p.scale) * kLog2E)) {}

  // What a key head is packed into.
  struct Head {
    float *mean, *key_scales, *values;
    uint8_t *panels, *value_panels;
    float *centre, *inverse, *value_scales;  // of each channel of the values
  };
  Head head_of(Parts& parts) const {
    Head h;
    h.mean = parts.take<float>(p.depth);
    h.key_scales = parts.take<float>(panels * kPanelKeys);
    h.panels = parts.take<uint8_t>(panels * product.panel_bytes(words));
    h.values = parts.take<float>(is_mixed ? 0 : values_padded * p.keys);
    h.value_panels = parts.take<uint8_t>(is_mixed ? value_panels() * value_words * 64 : 0);
    for (float** each : {&h.centre, &h.inverse, &h.value_scales}) *each = parts.take<float>(is_mixed ? values_padded : 0);
    return h;
  }
  // What a worker needs for a panel or a block of rows.
  struct Scratch {
    uint8_t *codes, *weights;
    float *row_scales, *out, *top, *sum, *scores;
  };
  Scratch scratch_of(Parts& parts) const {
    Scratch s;
    s.codes = parts.take<uint8_t>(kRowBlock * stride);
    s.weights = parts.take<uint8_t>(is_mixed ? kMostRows * kWeightStride : 0);
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
  int64_t panel() const { return 2 * floats.lanes; }  // columns of a panel of float values
  int64_t value_panels() const { return (p.value_depth + kPanelKeys - 1) / kPanelKeys; }
  int64_t blocks() const { return (rows + kRowBlock - 1) / kRowBlock; }

  void copy_codes(const uint8_t* from, int64_t code_bytes, int32_t offset, int8_t* to) const {
    for (int64_t c = 0; c < p.depth; c++) to[c] = static_cast<int8_t>(from[c * code_bytes] - offset);
  }
  void copy_weights(const uint8_t* from, int64_t count, uint8_t* to) const {
    for (int64_t j = 0; j < count; j++) to[j] = from[j * ints.mixture.code_bytes];
  }

  void prepare(int64_t head, const Head& to) const;
  void find_mean(int64_t head, float* mean) const;
  void find_value_scales(int64_t head, const Head& to) const;
  void pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const;
  void pack_values(int64_t head, int64_t from, int64_t end, const Head& to) const;
  void code_queries(int64_t head, int64_t first, int64_t count, const Scratch& scratch) const;
  void score(int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch) const;
  void trace_sums(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, int64_t used, const Head& from,
                  const Scratch& scratch) const;
  void strip(int64_t head, int64_t first, int64_t r, int64_t count, int64_t k0, const Head& from,
             const Scratch& scratch) const;
  void mix(int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch, float* out) const;
  void mix_floats(int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch, float* out) const;
  void finish(int64_t head, int64_t r, const float* from, float sum, const Head& packed) const;
  void block(int64_t head, int64_t index, const Head& from, const Scratch& scratch) const;
};

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

// Values are centred between the lowest and the highest of a channel: weights sum to 1, so the centre comes back at the end.
void Job::find_value_scales(int64_t head, const Head& to) const {
  float *low = to.centre, *high = to.value_scales;
  std::fill_n(to.centre, values_padded, 0.f);
  std::fill_n(to.inverse, values_padded, 0.f);
  ints.mixture.extents(value(head, 0), p.v_stride[2], p.keys, p.value_depth, low, high);
  for (int64_t c = 0; c < p.value_depth; c++) {
    const float lowest = low[c], highest = high[c];
    if (std::isnan(lowest)) {  // codes are 0 times an inverse of 0, and the scale shows it
      to.centre[c] = 0.f, to.value_scales[c] = lowest;
      continue;
    }
    to.centre[c] = lowest * 0.5f + highest * 0.5f;
    const float most = std::max({highest - to.centre[c], to.centre[c] - lowest, kSmallest});
    to.inverse[c] = 127.f / most, to.value_scales[c] = most / 127.f;
  }
}

void Job::prepare(int64_t head, const Head& to) const {
  find_mean(head, to.mean);
  if (is_mixed) find_value_scales(head, to);
}

void Job::pack_keys(int64_t head, int64_t i, const Head& to, const Scratch& scratch) const {
  const int64_t first = i * kPanelKeys, count = std::min(kPanelKeys, p.keys - first);
  float* scales = to.key_scales + first;
  ints.quantize(key(head, first), p.k_stride[2], count, to.mean, p.depth, {bits, 0, product.code_bytes}, scratch.codes, stride, scales);
  for (int64_t j = 0; j < count; j++) {
    const int64_t row = head * p.keys + first + j;
    if (trace.k_scales != nullptr) trace.k_scales[row] = scales[j];
    if (trace.k_codes != nullptr) copy_codes(scratch.codes + j * stride, product.code_bytes, 0, trace.k_codes + row * p.depth);
  }
  for (int64_t j = count; j < kPanelKeys; j++) {
    std::memset(scratch.codes + j * stride, 0, words * 4);
    scales[j] = 0.f;
  }
  uint8_t* panel = to.panels + i * product.panel_bytes(words);
  ints.pack(scratch.codes, stride, words, panel + product.start_bytes(words));
  if (product.start != nullptr) product.start(panel, words);
}

// The values of keys `from` (a multiple of a panel) to `end`.
void Job::pack_values(int64_t head, int64_t from, int64_t end, const Head& to) const {
  if (is_mixed) {
    const int64_t step = ints.mixture.keys_a_word();
    for (int64_t j = from; j < end; j += step)
      ints.mixture.pack(value(head, j), p.v_stride[2], std::min(step, end - j), p.value_depth, to.centre, to.inverse,
                        to.value_panels + j / step * 64, value_words * 64);
    return;
  }
  floats.pack_values(value(head, from), p.v_stride[2], end - from, p.value_depth, to.values + from * panel(), p.keys * panel());
}

void Job::code_queries(int64_t head, int64_t first, int64_t count, const Scratch& scratch) const {
  for (int64_t r = 0; r < count;) {  // the rows of one query head at a time
    const int64_t some = std::min(count - r, p.queries - (first + r) % p.queries);
    ints.quantize(query(head, first + r), p.q_stride[2], some, nullptr, p.depth, {bits, product.offset, product.code_bytes},
                  scratch.codes + r * stride, stride, scratch.row_scales + r);
    r += some;
  }
  for (int64_t r = 0; r < count; r++) {
    const int64_t row = query_row(head, first + r);
    if (trace.q_scales != nullptr) trace.q_scales[row] = scratch.row_scales[r];
    if (trace.q_codes != nullptr)
      copy_codes(scratch.codes + r * stride, product.code_bytes, product.offset, trace.q_codes + row * p.depth);
    scratch.row_scales[r] *= factor;
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
  int64_t own[kMostRows];
  for (int64_t i = 0; i < count; i++) {
    own[i] = std::clamp<int64_t>(limit(first + r + i) - k0, 0, used);
    const int64_t row = first + r + i;
    add_mask(p, batch_of(head), query_head(head, row), row % p.queries, k0, own[i], scratch.scores + i * kScoreStride);
  }
  float *out = scratch.out + r * values_padded, *top = scratch.top + r, *sum = scratch.sum + r;
  Weights w{scratch.scores, kScoreStride, count, 0, {}, {}, {}};
  if (is_mixed) {
    for (int64_t i = 0; i < count; i++) {
      uint8_t* weights = scratch.weights + i * kWeightStride;
      w.factor[i] = ints.mixture.weigh(scratch.scores + i * kScoreStride, own[i], up(used, kPanelKeys), weights, top + i, sum + i);
      if (trace.weights != nullptr) copy_weights(weights, own[i], trace.weights + query_row(head, first + r + i) * p.keys + k0);
    }
  } else {
    floats.start_weights(w, own, used, top, sum);
    floats.finish_weights(w, sum);
  }
  for (int64_t i = 0; i < count && k0 > 0; i++)
    if (w.factor[i] != 1.f)
      for (int64_t c = 0; c < values_padded; c++) out[i * values_padded + c] *= w.factor[i];
  is_mixed ? mix(count, k0, used, from, scratch, out) : mix_floats(count, k0, used, from, scratch, out);
}

void Job::mix(int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch, float* out) const {
  const int64_t step = ints.mixture.keys_a_word(), some = (used + step - 1) / step;
  for (int64_t c = 0; c < value_panels(); c++)
    for (int64_t i = 0; i < count; i += ints.rows)
      ints.mixture.tiles[std::min(ints.rows, count - i) - 1](
          scratch.weights + i * kWeightStride, kWeightStride, from.value_panels + (c * value_words + k0 / step) * 64, some,
          out + i * values_padded + c * kPanelKeys, values_padded, k0 == 0);
}

void Job::mix_floats(int64_t count, int64_t k0, int64_t used, const Head& from, const Scratch& scratch, float* out) const {
  floats.product[count - 1](scratch.scores, kScoreStride, from.values + k0 * panel(), p.keys * panel(), p.value_depth, used, out,
                            values_padded, k0 == 0, nullptr, nullptr);
}

// A row whose keys are all masked away has sum 0 and output 0.
void Job::finish(int64_t head, int64_t r, const float* from, float sum, const Head& packed) const {
  float* to = output(head, r);
  const float by = sum == 0.f ? 0.f : 1.f / sum;
  for (int64_t c = 0; c < p.value_depth; c++) to[c] = from[c] * by;
  if (!is_mixed || sum == 0.f) return;
  for (int64_t c = 0; c < p.value_depth; c++) to[c] = to[c] * packed.value_scales[c] + packed.centre[c];
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
  for (int64_t r = 0; r < count; r++) finish(head, first + r, scratch.out + r * values_padded, scratch.sum[r], from);
}

}  // namespace

extern "C" void fxquant_attention_int(const fxquant_attention_problem* problem, int32_t qk_bits, int32_t pv_bits,
                                      const fxquant_attention_trace* trace, int64_t workers, fxquant_parallel parallel,
                                      void* pool) {
  const Job job(*problem, qk_bits, pv_bits, trace);
  if (job.rows == 0 || job.heads == 0) return;
  if (job.heads * job.rows * problem->keys * (problem->depth + problem->value_depth) < kAloneProducts) workers = 1;
  const int64_t head_bytes = job.head_bytes(), scratch_bytes = job.scratch_bytes();
  const bool balanced = job.heads % workers == 0 || job.heads >= 4 * workers;
  if (balanced || job.blocks() == 1) {  // a worker packs the heads that it computes
    share(job.heads, workers, head_bytes + scratch_bytes, parallel, pool, [&](int64_t head, uint8_t* memory) {
      Parts parts{memory};
      const Job::Head packed = job.head_of(parts);
      const Job::Scratch scratch = job.scratch_of(parts);
      job.prepare(head, packed);
      for (int64_t i = 0; i < job.panels; i++) job.pack_keys(head, i, packed, scratch);
      job.pack_values(head, 0, problem->keys, packed);
      for (int64_t i = 0; i < job.blocks(); i++) job.block(head, i, packed, scratch);
    });
    return;
  }
  const auto shared = bytes(job.heads * head_bytes);
  const auto head_at = [&](int64_t head) {
    Parts parts{shared.get() + head * head_bytes};
    return job.head_of(parts);
  };
  share(job.heads, workers, 0, parallel, pool, [&](int64_t head, uint8_t*) { job.prepare(head, head_at(head)); });
  share(job.heads * job.panels, workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    const int64_t head = i / job.panels, first = i % job.panels * kPanelKeys;
    const Job::Head packed = head_at(head);
    job.pack_keys(head, i % job.panels, packed, job.scratch_of(parts));
    job.pack_values(head, first, std::min(first + kPanelKeys, problem->keys), packed);
  });
  share(job.heads * job.blocks(), workers, scratch_bytes, parallel, pool, [&](int64_t i, uint8_t* memory) {
    Parts parts{memory};
    const int64_t head = i / job.blocks(), last = job.blocks() - 1;
    job.block(head, last - i % job.blocks(), head_at(head), job.scratch_of(parts));  // causal: the longest first
  });
}
