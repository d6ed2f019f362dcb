// What an instruction set gives to the driver of quantized attention, and why 16-bit sums of 6-bit codes are exact.
#pragma once
#include "attention_int.h"
#include "attention_table.h"

#include <cstdint>

namespace fxquant::attention {

constexpr int64_t kPanelKeys = 16;  // keys of a panel, channels of a panel of values
// A row's largest magnitude counts as no less than this: its inverse stays finite.
constexpr float kSmallest = 0x1p-100f;

// Codes are symmetric, -top .. top.
constexpr int32_t top_code(int32_t bits) { return (1 << (bits - 1)) - 1; }
// Kernels that multiply unsigned by signed bytes keep a query's code as code + offset.
constexpr int32_t code_offset(int32_t bits) { return 1 << (bits - 1); }

// K is no constant, so the bound holds for any codes. A step adds two products of 6-bit codes to a 16-bit lane:
// (q + 32) k + (q' + 32) k', and the lane starts at -32 times the sum of its k: after T steps it is a sum of 2 T products
// q k. On the way it may wrap around, which modular addition undoes.
constexpr int64_t kSegment = 16;  // T
constexpr int64_t largest_product(int32_t bits) { return int64_t{top_code(bits)} * top_code(bits); }
static_assert(2 * kSegment * largest_product(6) <= 32767, "the end of a segment fits 16 bits");
static_assert(2 * (top_code(6) + code_offset(6)) * top_code(6) <= 32767, "vpmaddubsw never saturates");
// Sums go through float32 exactly, and products with the offset stay in 32 bits.
constexpr int64_t kMaxDepth = FXQUANT_ATTENTION_INT_DEPTH;
static_assert(kMaxDepth * largest_product(8) < (1 << 24));

// out[r][0..16) = float(sum_c q[r][c] k[j][c]) * (row_scales[r] * key_scales[j]) of one panel. Rows of codes are `stride`
// bytes apart; a panel holds its starts and then [words][16 keys] of 4 bytes.
using ScoreFn = void (*)(const uint8_t* codes, int64_t stride, const uint8_t* panel, int64_t words,
                         const float* row_scales, const float* key_scales, float* out, int64_t ldo);

// How codes are kept.
struct Coding {
  int32_t bits, offset;  // the offset is added to each code
  int64_t code_bytes;
};

// The product of q and k at one width of codes.
struct Product {
  int64_t code_bytes;  // 1, or 2 where bytes have no exact product
  int32_t offset;      // added to the codes of q
  int64_t segment;     // words of a segment: 64 bytes of starts each; 0: one segment, if there are starts at all
  const ScoreFn* tiles;  // [rows], for 1 row, 2 rows, ...
  void (*start)(uint8_t* panel, int64_t words);  // writes the starts of a panel from its words; null: there are none

  int64_t words(int64_t depth) const { return (depth * code_bytes + 3) / 4; }
  int64_t start_bytes(int64_t words) const {
    return start == nullptr ? 0 : segment == 0 ? 64 : (words + segment - 1) / segment * 64;
  }
  int64_t panel_bytes(int64_t words) const { return start_bytes(words) + words * 64; }
};

// Weights of 8 bits: rne(255 2^t) for t = score - max in base 2, by t = n + f and 255 2^f = c0 + f (c1 + f (c2 + f c3)), which
// is 7.5e-5 off at most (relative). The same operations everywhere, so that the codes have the same bits.
constexpr float kWeight0 = 0x1.fdf69cp+7f, kWeight1 = 0x1.619028p+7f, kWeight2 = 0x1.eeed3cp+5f, kWeight3 = 0x1.c23368p+3f;
constexpr float kFarBelow = -127.f;  // codes are 0 from -9 down
constexpr float kRound = 12582912.f;  // adding it rounds to an integer n
static_assert(kKeyBlock * 255 * 127 < (1 << 24), "sums over a block of keys go through float32 exactly");

// out[r][0..16) (+)= float(sum_j w[r][j] v[j][c]) of one panel of values, which is [words][16 channels] of 4 bytes.
using MixFn = void (*)(const uint8_t* weights, int64_t stride, const uint8_t* panel, int64_t words, float* out, int64_t ldo,
                       bool first);

// The product of weights and values.
struct Mixture {
  int64_t code_bytes;  // of a weight and of a value
  const MixFn* tiles;  // [rows]
  // One row of scores becomes weights: s is filled up to `padded` (a multiple of 16) with -inf, which has weight 0. The sum
  // of a row with a NaN is NaN. Returns what the earlier sum and output must be scaled by.
  float (*weigh)(float* s, int64_t count, int64_t padded, uint8_t* to, float* top, float* sum);
  // Lowest and highest value of each channel over the keys; NaN where one is not finite.
  void (*extents)(const float* v, int64_t ld, int64_t keys, int64_t depth, float* low, float* high);
  // One word of every channel: rne((v - centre) inverse) of `keys` keys, 0 beyond them. Panels are `stride` bytes apart;
  // centre and inverse are padded with zeros to a whole panel.
  void (*pack)(const float* v, int64_t ld, int64_t keys, int64_t depth, const float* centre, const float* inverse,
               uint8_t* to, int64_t stride);

  int64_t keys_a_word() const { return 4 / code_bytes; }
};

struct IntKernels {
  int64_t rows;  // most rows of a tile
  Product six, eight;
  Mixture mixture;
  // to[c] = the sum of k[j][c] over the keys, one after the other.
  void (*sum_keys)(const float* k, int64_t ld, int64_t keys, int64_t depth, float* to);
  // Rows of codes of x - mean (mean may be null), `stride` bytes apart and padded with zeros to a whole word; the scale of
  // a row with a value that is not finite is NaN, its codes are 0.
  void (*quantize)(const float* x, int64_t ld, int64_t rows, const float* mean, int64_t depth, const Coding& coding,
                   uint8_t* to, int64_t stride, float* scales);
  // Rows of whole numbers as codes, `depth` floats apart.
  void (*encode)(const float* codes, int64_t rows, int64_t depth, const Coding& coding, uint8_t* to, int64_t stride);
  // 16 rows of words, `stride` bytes apart -> [words][16].
  void (*pack)(const uint8_t* rows, int64_t stride, int64_t words, uint8_t* to);
};

extern const IntKernels kIntScalar, kIntAvx2, kIntAvxVnni, kIntAvx512;

}  // namespace fxquant::attention
