// Row programs: an encoder's half, a gated feed-forward and static linears, in blocks of rows and in parts of columns.
#include "program_stages.h"

#include "harness.h"
#include "linear.h"

#include <algorithm>
#include <cmath>

namespace sanitize {
namespace {

using namespace fxquant;

// A program under construction. Every register, vector and weight has a guarded buffer of exactly its size.
class Maker {
 public:
  Maker(Run& run, int64_t m, int32_t weight_bits, int32_t act_bits) : run_(run), m_(m), w_(weight_bits), a_(act_bits) {}

  int64_t input(int64_t width) {
    memory_.push_back(run_.rows(m_, width, width));
    registers_.push_back({width, memory_.back().data()});
    return registers_.size() - 1;
  }
  int64_t output(int64_t width) {
    memory_.push_back(run_.buffer<float>(m_ * width));
    registers_.push_back({width, memory_.back().data()});
    outputs_.push_back(memory_.size() - 1);
    return registers_.size() - 1;
  }
  int64_t scratch(int64_t width) {
    registers_.push_back({width, nullptr});
    return registers_.size() - 1;
  }
  void add(int64_t op, int64_t dst, int64_t a, int64_t b = 0, int64_t first = -1, int64_t second = -1, int64_t third = -1) {
    code_.push_back({op, dst, a, b, first, second, third});
  }
  void linear(int64_t dst, int64_t a, bool with_bias) {
    const int64_t bias = with_bias ? vector(width(dst)) : -1;
    add(kLinear, dst, a, weight(width(dst), width(a)), bias, w_, a_);
  }
  void linear_static(int64_t dst, int64_t a) {
    const int64_t b = weight(width(dst), width(a)), steps = vector(width(a));
    for (float& step : vectors_.back()) step = 1e-3f + std::abs(step);
    zero_points_.push_back(run_.buffer<int32_t>(1));
    zero_points_.back()[0] = 1 << (a_ - 1);
    params_.push_back(zero_points_.back().data());
    add(kLinearStatic, dst, a, b, -1, steps, a_);
  }
  int64_t vector(int64_t n) {
    vectors_.push_back(run_.normals(n));
    params_.push_back(vectors_.back().data());
    return params_.size() - 1;
  }

  void run(const std::string& label) {
    const double eps = 1e-5;
    const RowProgram program(m_, registers_, code_, packed_.data(), params_.data(), &eps);
    for (const int64_t block : {m_, std::min<int64_t>(m_, 5)}) {
      const Guarded<uint8_t> arena = run_.buffer<uint8_t>(program.arena_bytes(block));
      for (int64_t i = 0; i < m_; i += block) program.run(arena.data(), i, std::min(i + block, m_));
      collect(label + " blocks of " + std::to_string(block));
    }
    const Guarded<uint8_t> arena = run_.buffer<uint8_t>(program.arena_bytes(m_));
    for (int64_t stage = 0; stage < program.stages(); stage++)
      for (int64_t part = program.parts(stage); part-- > 0;) program.run_parts(arena.data(), stage, part, part + 1);
    collect(label + " parts");
  }

 private:
  int64_t width(int64_t reg) const { return registers_[reg].width; }
  int64_t weight(int64_t n, int64_t k) {
    const Guarded<int8_t> codes = run_.codes(n * k, (1 << (w_ - 1)) - 1);
    const Guarded<float> scales = run_.normals(n, 0.01f);
    weights_.push_back(run_.buffer<uint8_t>(fxquant_linear_packed_bytes(n, k, w_, a_)));
    if (fxquant_linear_pack(codes.data(), scales.data(), n, k, w_, a_, weights_.back().data()) != 0) std::abort();
    packed_.push_back(weights_.back().data());
    return packed_.size() - 1;
  }
  void collect(const std::string& label) {
    for (const int64_t out : outputs_) {
      run_.exact(label, memory_[out]);
      std::memset(memory_[out].data(), 0xff, memory_[out].size() * sizeof(float));
    }
  }

  Run& run_;
  int64_t m_;
  int32_t w_, a_;
  std::vector<Guarded<float>> memory_, vectors_;
  std::vector<Guarded<int32_t>> zero_points_;
  std::vector<Guarded<uint8_t>> weights_;
  std::vector<RowRegister> registers_;
  std::vector<RowInstruction> code_;
  std::vector<const uint8_t*> packed_;
  std::vector<const void*> params_;
  std::vector<int64_t> outputs_;
};

void encoder(Maker& p, int64_t n, int64_t hidden) {
  const int64_t attention = p.input(n), residual = p.input(n), stream = p.output(n), q = p.output(n), k = p.output(n);
  const int64_t x = p.scratch(n), wide = p.scratch(hidden), y = p.scratch(n);
  p.linear(x, attention, true);
  p.add(kAdd, x, x, residual);
  p.add(kLayerNorm, x, x, 0, p.vector(n), p.vector(n), 0);
  p.linear(wide, x, true);
  p.add(kGeluErf, wide, wide);
  p.linear(y, wide, false);
  p.add(kAdd, y, y, x);
  p.add(kLayerNorm, stream, y, 0, -1, -1, 0);
  p.linear(q, stream, true);
  p.linear(k, stream, false);
}

void gated(Maker& p, int64_t n, int64_t hidden) {
  const int64_t x = p.input(n), out = p.output(n), y = p.scratch(n), gate = p.scratch(hidden), up = p.scratch(hidden);
  p.add(kRmsNorm, y, x, 0, p.vector(n), -1, 0);
  p.add(kMulRow, y, y, 0, p.vector(n));
  p.linear(gate, y, false);
  p.add(kSilu, gate, gate);
  p.linear(up, y, true);
  p.add(kMul, up, gate, up);
  p.linear(out, up, false);
  p.add(kAdd, out, out, x);
}

void fixed(Maker& p, int64_t n, int64_t hidden) {
  const int64_t x = p.input(n), out = p.output(n), wide = p.scratch(hidden);
  p.linear_static(wide, x);
  p.add(kAddRow, wide, wide, 0, p.vector(hidden));
  p.add(kGeluTanh, wide, wide);
  p.add(kRelu, wide, wide);
  p.linear_static(out, wide);
}

void rows(Run& run) {
  constexpr struct { const char* name; void (*make)(Maker&, int64_t, int64_t); } kPrograms[] = {
      {"encoder", encoder}, {"gated", gated}, {"static", fixed}};
  constexpr struct { int64_t m, n, hidden; } kShapes[] = {{1, 1, 1}, {1, 33, 70}, {3, 17, 5}, {7, 65, 31}, {13, 16, 130}, {6, 5, 519}};
  constexpr int32_t kWidths[][2] = {{8, 8}, {8, 7}, {6, 6}};
  for (const auto& [name, make] : kPrograms)
    for (const auto& [m, n, hidden] : kShapes)
      for (const auto& [w, a] : kWidths) {
        Maker maker(run, m, w, a);
        make(maker, n, hidden);
        maker.run(std::string(name) + " w" + std::to_string(w) + "a" + std::to_string(a) + " " + std::to_string(m) + "x" +
                  std::to_string(n) + "x" + std::to_string(hidden));
      }
}

const Case kCase("rows", rows);

}  // namespace
}  // namespace sanitize
