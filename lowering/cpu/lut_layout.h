// Layout of a 2-bit weight packed for look-ups, and the table of kernels that each instruction set fills in.
//
// A weight code is -1, 0 or 1: the difference of two bits, plus and minus. Four neighbouring bits of one plane are an
// index into a 16-entry table of one row: entry i is the sum of those of four activation codes that i has a bit for.
// So one byte shuffle gives the four-term sums of 16 columns in both planes, and no product is left. All is unsigned:
//   act_bits  largest entry   bytes added before widening
//   up to 4   4 * 15 = 60     4 entries, at most 240
//   5         4 * 31 = 124    2 entries, at most 248
//   6         4 * 63 = 252    1 entry
#pragma once
#include "layout.h"

namespace fxquant {

constexpr int64_t kLutRows = 8;        // most rows of a block
constexpr int64_t kLutStep = 16;       // k values of a step: four tables a row, 64 bytes of indices a panel
constexpr int64_t kLutChunk = 32;      // steps whose tables stay in L1, and whose plus - minus fits 16 bits
constexpr int64_t kLutPanels = 8;     // panels whose sums are kept while the chunks of k pass by; even
constexpr int64_t kLutSums = kLutRows * kPanel;
constexpr uint32_t kLutMagic = 0x54515846;  // "FXQT"
constexpr int32_t kLutMaxActBits = 6;

// A 16-bit lane holds the plus sum less the minus sum of one chunk: 512 codes of at most 63.
static_assert(kLutChunk * kLutStep * 63 <= 32767);

// Entries that may be added in 8 bits.
constexpr int32_t lut_depth(int32_t act_bits) { return act_bits <= 4 ? 4 : act_bits == 5 ? 2 : 1; }

// Offsets of the sections of a packed weight, each 64-byte aligned. Indices: [panels][steps][2 halves][16 columns][plus,
// minus], one byte each; its low nibble is the index of the first four k of the half, its high nibble of the next four.
struct LutLayout {
  int64_t n, k, panels, steps, indices, scales, sums, bytes;

  LutLayout(int64_t n_, int64_t k_) : n(n_), k(k_), panels((n_ + kPanel - 1) / kPanel), steps((k_ + kLutStep - 1) / kLutStep) {
    indices = 64;
    scales = indices + panels * steps * 64;
    sums = scales + panels * 64;
    bytes = sums + panels * 64;
  }
};

// The tables of one row of codes: 64 bytes a step, to tables + step * kLutRows * 64. Reads steps * 16 codes.
using LutBuildFn = void (*)(const uint8_t* codes, int64_t steps, uint8_t* tables);
// Sums of `steps` steps (at most a chunk) of one panel, or of two where `next` is used: int32 [panels][kLutRows][16],
// added to what is there unless `first`.
using LutLookUpFn = void (*)(
    const uint8_t* tables, const uint8_t* indices, const uint8_t* next, int64_t steps, bool first, int32_t* sums);

struct LutKernels {
  LutBuildFn build;
  LutLookUpFn look_up[3][kLutRows];  // by depth (1, 2, 4) and rows
  int64_t panels;                    // panels of one call: 1 or 2
};

extern const LutKernels kLutScalar, kLutAvx2, kLutAvx512;

}  // namespace fxquant
