// Packs a weight and proves its accumulation schedule.
//
// A 16-bit lane adds pairs of products of one column. Weights are known here, so the worst case over all inputs is known:
// over a segment the lane lies in [-X * neg, X * pos] with X the largest activation code and pos, neg the sums of the
// positive and of the negated negative weights of the lane. Started at a centre c, it is exact while X * (pos + neg)
// <= 65535: additions wrap, only the end value must fit. The centres' sum is taken out once, in 32 bits.
#include "layout.h"
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace fxquant {
namespace {

struct Lane {
  int64_t pos = 0, neg = 0;
};

class PanelSchedule {
 public:
  PanelSchedule(uint8_t* packed, const Layout& layout, int64_t panel, int64_t most)
      : step_(packed + layout.weights + panel * layout.steps * 64),
        lengths_(reinterpret_cast<uint16_t*>(packed + layout.lengths) + panel * layout.capacity),
        centres_(reinterpret_cast<int16_t*>(packed + layout.centres) + panel * layout.capacity * 32),
        starts_(reinterpret_cast<int32_t*>(packed + layout.starts) + panel * 16),
        capacity_(layout.capacity),
        most_(most) {}

  // The number of segments, or -1 where a step cannot be proved safe.
  int64_t build(int64_t steps) {
    std::fill_n(starts_, 16, 0);
    for (int64_t s = 0; s < steps; s++) {
      if (!fits(s)) {
        if (!close()) return -1;
        if (!fits(s)) return -1;
      }
      add(s);
    }
    return length_ == 0 || close() ? count_ : -1;
  }

 private:
  int64_t weight(int64_t step, int64_t lane, int64_t half) const {
    return reinterpret_cast<const int8_t*>(step_)[step * 64 + lane * 2 + half];
  }
  Lane after(int64_t step, int64_t lane) const {
    Lane sum = lanes_[lane];
    for (int64_t half = 0; half < 2; half++) {
      const int64_t w = weight(step, lane, half);
      (w > 0 ? sum.pos : sum.neg) += std::abs(w);
    }
    return sum;
  }
  bool fits(int64_t step) const {
    if (length_ == UINT16_MAX) return false;
    for (int64_t lane = 0; lane < 32; lane++) {
      const Lane sum = after(step, lane);
      if (most_ * (sum.pos + sum.neg) > 65535) return false;
    }
    return true;
  }
  void add(int64_t step) {
    for (int64_t lane = 0; lane < 32; lane++) lanes_[lane] = after(step, lane);
    length_++;
  }
  bool close() {
    if (length_ == 0 || count_ == capacity_) return false;
    for (int64_t lane = 0; lane < 32; lane++) {
      const int64_t low = -most_ * lanes_[lane].neg, high = most_ * lanes_[lane].pos;
      const int64_t centre = std::clamp<int64_t>(-(low + high) / 2, -32768 - low, 32767 - high);
      if (centre + low < -32768 || centre + high > 32767) return false;
      centres_[count_ * 32 + lane] = static_cast<int16_t>(centre);
      starts_[lane / 2] -= static_cast<int32_t>(centre);
    }
    lengths_[count_++] = static_cast<uint16_t>(length_);
    std::fill_n(lanes_, 32, Lane{});
    length_ = 0;
    return true;
  }

  const uint8_t* step_;
  uint16_t* lengths_;
  int16_t* centres_;
  int32_t* starts_;
  int64_t capacity_, most_, length_ = 0, count_ = 0;
  Lane lanes_[32];
};

}  // namespace
}  // namespace fxquant

using namespace fxquant;

extern "C" int64_t fxquant_linear_packed_bytes(int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits) {
  return Layout(n, k, weight_bits, act_bits).bytes;
}

extern "C" int64_t fxquant_linear_features(const uint8_t* packed) {
  return reinterpret_cast<const Header*>(packed)->k;
}

extern "C" int32_t fxquant_linear_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, uint8_t* out) {
  const Layout layout(n, k, weight_bits, act_bits);
  const int32_t limit = (1 << (weight_bits - 1)) - 1;
  if (std::any_of(codes, codes + n * k, [&](int8_t code) { return code < -limit || code > limit; })) return 1;
  std::memset(out, 0, layout.centres);  // the centres beyond a panel's count are never read
  const Header header{kMagic, kVersion, n, k, weight_bits, act_bits};
  std::memcpy(out, &header, sizeof header);
  std::memcpy(out + layout.scales, scales, n * sizeof(float));
  int32_t* sums = reinterpret_cast<int32_t*>(out + layout.sums);
  for (int64_t j = 0; j < n; j++) {
    uint8_t* panel = out + layout.weights + j / kPanel * layout.steps * 64 + j % kPanel * kStep;
    for (int64_t i = 0; i < k; i++) {
      panel[i / kStep * 64 + i % kStep] = static_cast<uint8_t>(codes[j * k + i]);
      sums[j] += codes[j * k + i];
    }
  }
  if (!has_schedule(weight_bits, act_bits)) return 0;
  int32_t* counts = reinterpret_cast<int32_t*>(out + layout.counts);
  for (int64_t panel = 0; panel < layout.panels; panel++) {
    const int64_t count = PanelSchedule(out, layout, panel, (1 << act_bits) - 1).build(layout.steps);
    if (count < 0) return 2;
    counts[panel] = static_cast<int32_t>(count);
  }
  return 0;
}
