// What an instruction set gives to the attention driver.
#pragma once
#include <cstdint>

namespace fxquant::attention {

constexpr int64_t kKeyBlock = 512;   // keys between two rescalings; a block's scores of a strip of rows stay in L1
constexpr int64_t kHeadRows = 256;   // rows that take turns at a block of keys, where a worker has a head to itself
constexpr int64_t kTaskRows = 96;    // the same where workers share the heads
constexpr int64_t kDirectRows = 4;   // up to so many rows a key head, packing would cost more than it saves
constexpr int64_t kDirectKeys = 256; // keys of a task there; partial results are merged in order

constexpr int64_t kMostRows = 12, kMostLanes = 16;

// The softmax of a strip of rows on its way: scores become weights one panel of keys after the other.
struct Weights {
  float* scores;  // the next panel
  int64_t ld, rows, left;  // `left` panels are still scores
  float shift[kMostRows], factor[kMostRows];
  alignas(64) float lanes[kMostRows * kMostLanes];  // sums by lane
};

// y[r][0..columns) (+)= sum_i x[r][i] w[i][0..columns), times by[r] where by is given. w stands in panels of two vectors
// of columns, `panel` floats apart; y has room for whole vectors. Weighs panels of `beside` on the way.
using ProductFn = void (*)(const float* x, int64_t ldx, const float* w, int64_t panel, int64_t columns, int64_t count,
                           float* y, int64_t ldy, bool first, const float* by, Weights* beside);

// attention_softmax.h and attention_kernels.h tell what each one does.
struct Kernels {
  int64_t lanes;  // of a vector; a panel is two vectors wide
  int64_t rows;   // most rows of a product
  const ProductFn* product;  // [rows], for 1 row, 2 rows, ...
  void (*start_weights)(Weights& w, const int64_t* own, int64_t used, float* top, float* sum);
  void (*finish_weights)(Weights& w, float* sum);
  void (*add_mask)(float* s, const float* mask, int64_t step, int64_t count);
  void (*hide)(float* s, const uint8_t* mask, int64_t step, int64_t count);
  void (*pack_keys)(const float* k, int64_t ld, int64_t rows, int64_t depth, float factor, float* to);
  void (*pack_values)(const float* v, int64_t ld, int64_t rows, int64_t depth, float* to, int64_t panel);
  void (*dot_rows)(const float* q, int64_t rows, const float* k, int64_t ld, int64_t keys, int64_t depth, float* scores,
                   int64_t lds);
  void (*mix_rows)(const float* p, int64_t ldp, int64_t rows, const float* v, int64_t ld, int64_t keys, int64_t depth,
                   float* out, int64_t ldo);
};

extern const Kernels kScalar, kAvx2, kAvx512;

}  // namespace fxquant::attention
