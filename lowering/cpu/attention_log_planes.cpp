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

// The last shift of every group. A sum of a row's weights is at most 1 / scale times half a step and the rounding of a
// mantissa, and its part from one shift on at most the number of keys times the greatest of it. The last group takes what is
// left, exact or not.
std::vector<int64_t> groups_of(const Family& family, int64_t blocks, int64_t keys, double largest) {
  const double f = static_cast<double>(family.denominator());
  double total = 0;
  int64_t farthest = 0;
  for (int64_t block = 0; block < blocks; block++) {
    const double step = std::exp2(0.5 / family.factor(block)) * (family.p.family == FXQUANT_ADALOG ? 1 + 1 / f : 1);
    total = std::max(total, step * kSlack / family.scale(block));
    farthest = std::max(farthest, family.level(block, family.p.codes - 1).shift);
  }
  farthest = std::min(farthest, kFarthest);
  std::vector<int64_t> groups;
  for (int64_t first = 0, last; first <= farthest; first = last + 1) {
    const double most = std::min(static_cast<double>(keys), std::ldexp(total, static_cast<int>(first)));
    const double limit = kExact / (largest * most) / f;
    const bool fits = limit >= 1 && static_cast<int64_t>(groups.size()) < kMostGroups - 1;  // not for a limit of NaN
    last = fits ? std::min<int64_t>(first + std::ilogb(limit), farthest) : farthest;
    groups.push_back(last);
  }
  return groups;
}

}  // namespace

float largest_code(const fxquant_uniform_codes& codes, int64_t heads, int64_t channels) {
  const float top = static_cast<float>(codes.top);
  if (codes.zero_point == nullptr) return top;
  const int64_t count = codes.head_step != 0 ? heads : codes.channel_step != 0 ? channels : 1;
  float largest = 0;
  for (int64_t i = 0; i < count; i++)
    largest = std::max({largest, std::abs(codes.zero_point[i]), std::abs(top - codes.zero_point[i])});
  return largest;
}

Planes planes_of(const fxquant_attention_problem& problem, const fxquant_log_attention& format) {
  const fxquant_log_codes& p = format.p;
  const Family family(p);
  const int64_t blocks = p.head_step == 0 ? 1 : problem.heads;
  const double largest = largest_code(format.v, problem.kv_heads, problem.value_depth);
  const std::vector<int64_t> groups = groups_of(family, blocks, problem.keys, largest);
  const int64_t parities = family.parities();
  Planes made;
  made.count = static_cast<int64_t>(groups.size()) * parities;
  made.size = p.codes == kShortTable ? kShortTable : (p.codes + kShortTable) / kShortTable * kShortTable;
  made.tables.assign(blocks * made.count * made.size, 0.f);
  for (int64_t block = 0; block < blocks; block++) {
    made.factors.push_back(static_cast<float>(family.factor(block)));
    made.shifts.push_back(std::log2(family.scale(block)));
    float* tables = made.tables.data() + block * made.count * made.size;
    for (int64_t code = 0; code < p.codes; code++) {
      const Level level = family.level(block, code);
      if (level.shift > groups.back()) continue;
      const int64_t group = std::lower_bound(groups.begin(), groups.end(), level.shift) - groups.begin();
      const int64_t weight = level.mantissa << (groups[group] - level.shift);
      tables[(group * parities + level.is_odd) * made.size + code] = static_cast<float>(weight);
    }
    for (int64_t plane = 0; plane < made.count; plane++) {
      const double scale = std::ldexp(family.scale(block), -static_cast<int>(groups[plane / parities]));
      const double unit = scale / static_cast<double>(family.denominator());
      made.units.push_back(static_cast<float>(unit * (plane % parities ? std::sqrt(2.0) : 1.0)));
    }
  }
  return made;
}

}  // namespace fxquant::attention
