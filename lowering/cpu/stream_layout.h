// Layout of a streamed weight and of the rows that meet it; the table of kernels that each instruction set fills in.
//
// A panel is 16 columns. It is one linear stream, read front to back: for each group of k its steps, then the group's 16
// scales (float) and, for integer activations, the 16 sums of its codes (int16; int32 where the group is the whole k). A
// step is 64 bytes, one 32-bit word a column: 32 / bits codes. Panels follow one another, so a thread that owns a range of
// columns reads one contiguous range of memory.
//
// Byte b of a word holds, from its lowest bits up, the codes of k = b, 4 + b, 8 + b ...: masking all bytes of a word at once
// gives 4 neighbours of k for an integer dot product. 2- and 4-bit codes are stored + 2^(bits - 1), as unsigned numbers. An
// 8-bit step is [4 k][16 columns], signed: it is read by sign extension alone.
//
// A weight of a table has 4-bit codes that stand for any 16 floats, which follow the header.
#pragma once
#include "layout.h"

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace fxquant::stream {

constexpr uint32_t kStreamMagic = 0x53515846;  // "FXQS"
constexpr uint32_t kStreamVersion = 1;
constexpr int64_t kHeaderBytes = 64, kTableBytes = 64;
constexpr int64_t kStepBytes = 64;
constexpr int64_t kAhead = 2048;    // bytes of prefetch: covers the latency of DRAM at the rate that one core can read
constexpr int64_t kRowBlock = 128;  // rows that meet a panel while it is in cache
constexpr int64_t kPass = 4;        // rows of one pass over a panel: their sums and its codes fill 16 registers

struct StreamHeader {
  uint32_t magic, version;
  int64_t n, k;
  int32_t weight_bits, act_bits, group, has_table;
};

struct StreamLayout {
  int64_t n, k, panels, bits, group, groups, step_k, steps, group_steps, tail, panel_bytes, bytes;
  bool is_integer, has_wide_sums, has_table;

  StreamLayout(int64_t n_, int64_t k_, int32_t weight_bits, int32_t act_bits, int32_t group_, bool has_table_ = false)
      : n(n_), k(k_), panels((n_ + kPanel - 1) / kPanel), bits(weight_bits), group(group_ ? group_ : k_),
        groups((k + group - 1) / group), step_k(32 / weight_bits), steps((k + step_k - 1) / step_k),
        group_steps((group + step_k - 1) / step_k), is_integer(act_bits != 16), has_wide_sums(group_ == 0),
        has_table(has_table_) {
    tail = 64 + (is_integer ? (has_wide_sums ? 64 : 32) : 0);
    panel_bytes = steps * kStepBytes + groups * tail;
    bytes = panel_at(panels);
  }
  explicit StreamLayout(const StreamHeader& h)
      : StreamLayout(h.n, h.k, h.weight_bits, h.act_bits, h.group, h.has_table != 0) {}

  int64_t bias() const { return bits == 8 || has_table ? 0 : int64_t{1} << (bits - 1); }
  int64_t panel_at(int64_t p) const { return kHeaderBytes + (has_table ? kTableBytes : 0) + p * panel_bytes; }
  int64_t padded_k() const { return steps * step_k; }
  // Offsets inside a panel; `last` because the last group may be shorter.
  int64_t step_at(int64_t step) const { return step * kStepBytes + step / group_steps * tail; }
  int64_t steps_of(int64_t g) const { return g + 1 < groups ? group_steps : steps - g * group_steps; }
  int64_t tail_at(int64_t g) const { return (g * group_steps + steps_of(g)) * kStepBytes + g * tail; }
};

// Where a code stands: its byte in the step, and how far it is shifted up there.
struct Place {
  int64_t byte, shift;

  Place(int64_t bits, int64_t k, int64_t column)
      : byte(bits == 8 ? k * kPanel + column : column * 4 + k % 4), shift(k / 4 * bits % 8) {}
};

// Scratch memory of m rows. Integer activations: scale float [m], 128 - zero point int32 [m], minus 2^(b-1) times the sum
// of the shifted codes of each group int32 [m][groups], shifted codes int8 [m][stride]. Float activations: minus 2^(b-1)
// times the sum of x over each group float [m][groups], x float [m][stride bytes], scaled for the masks of a word where
// kernels mask in place.
struct StreamScratch {
  int64_t shifts, corrections, codes, stride, bytes;

  StreamScratch(const StreamLayout& l, int64_t m) {
    shifts = align64(m * 4);
    corrections = l.is_integer ? 2 * shifts : 0;
    codes = corrections + align64(m * l.groups * 4);
    stride = align64(l.padded_k() * (l.is_integer ? 1 : 4)) | 64;  // odd in cache lines, as in layout.h
    bytes = codes + m * stride;
  }
};

// Prepared float rows.
struct FloatRows {
  const float* values;
  int64_t stride;            // in floats
  const float* corrections;  // [rows][groups]
};

// Quantized rows: codes - 128, and what each needs to turn sums of products into sum_k (q - zero_point) w.
struct IntegerRows {
  const int8_t* codes;
  int64_t stride;
  const int32_t* corrections;  // [rows][groups]
  const int32_t* shifts;       // 128 - zero point
  const float* scales;
};

// Group g of an integer panel.
struct Tail {
  const float* scales;
  const void* sums;  // int16 [16], or int32 [16] if `is_wide`
  bool is_wide;

  Tail(const uint8_t* panel, const StreamLayout& l, int64_t g)
      : scales(reinterpret_cast<const float*>(panel + l.tail_at(g))), sums(scales + kPanel), is_wide(l.has_wide_sums) {}
  int32_t sum(int64_t c) const {
    return is_wide ? static_cast<const int32_t*>(sums)[c] : static_cast<const int16_t*>(sums)[c];
  }
};

struct StreamKernels {
  // 1 to kPass rows, one panel -> out[rows][16]; [bits 2, 4, 8][rows - 1].
  void (*rows_float[3][kPass])(const FloatRows& x, const uint8_t* panel, const StreamLayout& l, float* out);
  // The same for a weight of a table, float [16]; x as it is.
  void (*rows_table[kPass])(const FloatRows& x, const uint8_t* panel, const StreamLayout& l, const float* table, float* out);
  // `sums`, where it is not null, gets the sums of the groups too: int32 [rows][groups][16].
  void (*rows_integer[kPass])(const IntegerRows& x, const uint8_t* panel, const StreamLayout& l, float* out, int32_t* sums);
  bool masks_in_place;  // rows_float wants x scaled down by what masks leave codes shifted up
};

extern const StreamKernels kStreamScalar, kStreamAvx2, kStreamAvx512Vnni;

}  // namespace fxquant::stream
