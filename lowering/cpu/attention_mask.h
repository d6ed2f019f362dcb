// A mask on scores in base 2, the same bits for every instruction set.
#pragma once
#include "attention.h"

#include <cfloat>
#include <cstdint>
#include <limits>

namespace fxquant::attention {
namespace {

// s[j] += log2(e) mask[j] for `count` keys from `first` on. A finite mask stays finite, so that a row of the lowest float is
// uniform, not empty.
void add_mask(const fxquant_attention_problem& p, int64_t batch, int64_t head, int64_t query, int64_t first, int64_t count,
              float* s) {
  constexpr float kLog2E = 1.44269504f;
  if (p.mask_kind == FXQUANT_MASK_NONE) return;
  const int64_t step = p.mask_stride[3];
  const int64_t offset = batch * p.mask_stride[0] + head * p.mask_stride[1] + query * p.mask_stride[2] + first * step;
  if (p.mask_kind == FXQUANT_MASK_BOOL) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + offset;
    for (int64_t j = 0; j < count; j++) s[j] += mask[j * step] ? 0.f : -std::numeric_limits<float>::infinity();
    return;
  }
  const float* mask = static_cast<const float*>(p.mask) + offset;
  const auto add = [](float score, float m) {
    const float base2 = m * kLog2E;
    return score + (m >= -FLT_MAX && base2 < -FLT_MAX ? -FLT_MAX : base2);
  };
  if (step == 1)
    for (int64_t j = 0; j < count; j++) s[j] = add(s[j], mask[j]);
  else
    for (int64_t j = 0; j < count; j++) s[j] = add(s[j], mask[j * step]);
}

}  // namespace
}  // namespace fxquant::attention
