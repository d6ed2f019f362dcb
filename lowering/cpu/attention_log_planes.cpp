#include "attention_log_planes.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace fxquant::attention {

namespace {

constexpr double kSlack = 1.001;  // for the rounding of lse, far more than it is

struct Level {
  int64_t shift, mantissa;
  bool is_odd;
};

struct Family {
  const fxquant_log_codes& p;
  std::array<int64_t, kParts> mantissas{};

  explicit Family(const fxquant_log_codes& of) : p(of) {
    for (int64_t i = 0; i < kParts && p.family == FXQUANT_ADALOG; i++)
      mantissas[i] = static_cast<int64_t>(std::nearbyint(std::exp2(-static_cast<double>(i) / kParts) * denominator()));
  }
  int64_t denominator() const { return p.family == FXQUANT_ADALOG ? (int64_t{2} << p.width) - 2 : 1; }
  int64_t parities() const { return p.family == FXQUANT_LOG_SQRT2 ? 2 : 1; }
  double scale(int64_t block) const { return p.scale[block * p.head_step]; }
  // A base is a whole number from 1; anything else would be no calibration's.
  int64_t base(int64_t block) const { return static_cast<int64_t>(std::clamp(p.base[block * p.head_step], 1.f, 1e6f)); }
  double factor(int64_t block) const {
    if (p.family == FXQUANT_ADALOG) return kParts / static_cast<double>(base(block));
    return p.family == FXQUANT_LOG_SQRT2 ? 2 : 1;
  }
  Level level(int64_t block, int64_t code) const {
    if (p.family == FXQUANT_LOG_SQRT2) return {(code + 1) / 2, 1, code % 2 == 1};
    if (p.family == FXQUANT_LOG2) return {code, 1, false};
    const int64_t steps = code * base(block);
    return {steps / kParts, mantissas[steps % kParts], false};
  }
};

// A sum of a row's weights is at most the number of its keys, and at most 1 / scale times half a step and the rounding of a
// mantissa.
int64_t span_of(const Family& family, int64_t blocks, int64_t keys, int32_t largest) {
  const double f = static_cast<double>(family.denominator());
  double most = 0;
  for (int64_t block = 0; block < blocks; block++) {
    const double step = std::exp2(0.5 / family.factor(block)) * (family.p.family == FXQUANT_ADALOG ? 1 + 1 / f : 1);
    most = std::max(most, std::min(static_cast<double>(keys), step * kSlack / family.scale(block)));
  }
  const double limit = kExact / (largest * most) / f;
  return limit >= 1 ? std::min<int64_t>(std::ilogb(limit), kMostSpan) : 0;  // NaN too
}

}  // namespace

Planes planes_of(const fxquant_log_codes& p, int64_t blocks, int64_t keys, int32_t largest) {
  const Family family(p);
  const int64_t span = span_of(family, blocks, keys, largest), parities = family.parities();
  int64_t farthest = 0;
  for (int64_t block = 0; block < blocks; block++) farthest = std::max(farthest, family.level(block, p.codes - 1).shift);
  Planes made;
  made.count = (std::min(farthest, kFarthest) / (span + 1) + 1) * parities;
  made.size = (p.codes + kShortTable) / kShortTable * kShortTable;  // the code of zero has an entry
  if (p.codes == kShortTable) made.size = kShortTable;              // or is beyond a short table
  made.tables.assign(blocks * made.count * made.size, 0.f);
  for (int64_t block = 0; block < blocks; block++) {
    made.factors.push_back(static_cast<float>(family.factor(block)));
    made.shifts.push_back(std::log2(family.scale(block)));
    float* tables = made.tables.data() + block * made.count * made.size;
    for (int64_t code = 0; code < p.codes; code++) {
      const Level level = family.level(block, code);
      if (level.shift > kFarthest) continue;
      const int64_t plane = level.shift / (span + 1) * parities + level.is_odd;
      tables[plane * made.size + code] = static_cast<float>(level.mantissa << (span - level.shift % (span + 1)));
    }
    for (int64_t plane = 0; plane < made.count; plane++) {
      const int64_t shift = plane / parities * (span + 1) + span;
      const double unit = std::ldexp(family.scale(block), -static_cast<int>(shift)) / static_cast<double>(family.denominator());
      made.units.push_back(static_cast<float>(unit * (plane % parities ? std::sqrt(2.0) : 1.0)));
    }
  }
  return made;
}

}  // namespace fxquant::attention
