// The weight of every logarithmic code as a whole number, in planes whose sums of products are exact in float32.
#pragma once
#include "attention_log.h"

#include <cstdint>
#include <vector>

namespace fxquant::attention {

// A multiplication by 1 << n is a shift, and float32 adds whole numbers below 2^24 exactly: fused multiply-adds on whole
// numbers give the bits of shifts and adds, twice as fast as AVX2 shifts lanes by different counts.
constexpr double kExact = 16777216.0;
constexpr int64_t kFarthest = 31;  // shifts beyond it count as zero
constexpr int64_t kMostGroups = 4;   // of shifts; log√2 has two planes of each
constexpr int64_t kParts = 37;  // of an octave of AdaLog
constexpr int64_t kShortTable = 16;  // entries of a table that fits registers

struct Planes {
  int64_t count, size;  // planes; entries of a table, those beyond the codes are 0 (16 codes: without an entry for zero)
  std::vector<float> tables, units;  // [blocks][count][size] and [blocks][count]
  std::vector<float> factors;        // k of a block
  std::vector<double> shifts;        // log2 of the scale of a block

  const float* table(int64_t block, int64_t plane) const { return tables.data() + (block * count + plane) * size; }
};

// The greatest magnitude of a code less its zero point, over a number of heads or channels.
float largest_code(const fxquant_uniform_codes& codes, int64_t heads, int64_t channels);

Planes planes_of(const fxquant_attention_problem& problem, const fxquant_log_attention& format);

}  // namespace fxquant::attention
