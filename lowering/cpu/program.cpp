// Turns a row program into stages and runs them on a block of rows.
#include "program.h"

#include "isa.h"
#include "layout.h"
#include "linear.h"

#include <algorithm>

namespace fxquant {
namespace {

constexpr int64_t kArenaBudget = 640 << 10;  // of a second-level cache of 1 MiB, which weights pass through too
constexpr int64_t kMostRows = 96;
constexpr int64_t kChunk = 4;  // rows that pass through norms and quantization together: they stay in L1

const RowFunctions& functions_in_force() {
  constexpr const RowFunctions* kTable[] = {&kRowsScalar, &kRowsAvx2, &kRowsAvx2, &kRowsAvx512};
  return *kTable[fxquant_isa()];
}

bool is_linear(int64_t op) { return op == kLinear || op == kLinearStatic; }

bool is_elementwise(int64_t op) { return op >= kGeluErf; }

// An odd number of cache lines: rows a power of two apart would fall into one set of the first-level cache.
int64_t padded(int64_t width) { return ((width + 15) / 16 * 16) | 16; }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace

RowProgram::RowProgram(int64_t m, std::vector<RowRegister> registers, std::vector<RowInstruction> code,
                       std::vector<const uint8_t*> packed, std::vector<const float*> params, std::vector<float> constants)
    : m_(m), registers_(std::move(registers)), code_(std::move(code)), packed_(std::move(packed)),
      params_(std::move(params)), constants_(std::move(constants)), functions_(functions_in_force()) {
  for (const RowRegister& reg : registers_) {
    offsets_.push_back(floats_);
    if (reg.memory == nullptr) floats_ += padded(reg.width);
  }
  std::vector<int64_t> versions(registers_.size(), 0);
  for (int64_t i = 0; i < static_cast<int64_t>(code_.size()); i++) {
    if (is_linear(code_[i].op))
      add_linear(i, versions);
    else {
      if (stages_.empty() || (stages_.back().is_linear && !follows_linear(code_[i]))) stages_.push_back({false, {}});
      stages_.back().steps.push_back({i, -1});
    }
    versions[code_[i].dst]++;
  }
  assign_lanes();
}

void RowProgram::add_linear(int64_t index, const std::vector<int64_t>& versions) {
  const RowInstruction& it = code_[index];
  const int32_t weight_bits = reinterpret_cast<const Header*>(packed_[it.b])->weight_bits;
  const int32_t act_bits = static_cast<int32_t>(it.third);
  const int64_t steps = it.op == kLinearStatic ? it.second : -1;
  const bool wide = is_wide(weight_bits, act_bits);
  const auto holds = [&](const Codes& c) {
    return c.source == it.a && c.version == versions[it.a] && c.act_bits == act_bits && c.wide == wide &&
           c.steps == steps;
  };
  const auto found = std::find_if(codes_.begin(), codes_.end(), holds);
  const int64_t codes = found - codes_.begin();
  if (found == codes_.end()) {
    codes_.push_back({it.a, versions[it.a], registers_[it.a].width, index, 0, weight_bits, act_bits, wide, steps});
    if (stages_.empty() || stages_.back().is_linear) stages_.push_back({false, {}});
    stages_.back().steps.push_back({index, codes});
  }
  codes_[codes].last = index;
  stages_.push_back({true, {{index, codes}}});
}

// Codes that are not needed at the same time share memory.
void RowProgram::assign_lanes() {
  std::vector<int64_t> busy;  // the last instruction that reads a lane's codes
  for (const Stage& stage : stages_)
    for (const Step& step : stage.steps) {
      if (stage.is_linear || step.codes < 0) continue;
      Codes& codes = codes_[step.codes];
      const auto is_free = [&](int64_t last) { return last < step.instruction; };
      codes.lane = std::find_if(busy.begin(), busy.end(), is_free) - busy.begin();
      if (codes.lane == static_cast<int64_t>(busy.size())) {
        busy.push_back(0);
        lane_codes_.push_back(step.codes);
      }
      busy[codes.lane] = codes.last;
      const auto bytes = [this](int64_t c) { return Scratch(1, codes_[c].k, codes_[c].wide).bytes; };
      if (bytes(step.codes) > bytes(lane_codes_[codes.lane])) lane_codes_[codes.lane] = step.codes;
    }
}

// Elementwise work right after a linear, on as many columns, runs while the linear's tile is in L1.
bool RowProgram::follows_linear(const RowInstruction& it) const {
  const int64_t n = registers_[code_[stages_.back().steps.front().instruction].dst].width;
  return is_elementwise(it.op) && registers_[it.dst].width == n;
}

int64_t RowProgram::block_rows(int64_t threads) const {
  if (splits_columns(threads)) return m_;
  int64_t bytes = floats_ * 4 + 1;  // a program may need no arena at all
  for (int64_t codes : lane_codes_) bytes += Scratch(1, codes_[codes].k, codes_[codes].wide).stride;
  const int64_t most = std::clamp<int64_t>(kArenaBudget / bytes, 8, kMostRows);
  const int64_t blocks = round_up((m_ + most - 1) / most, threads);
  return (m_ + blocks - 1) / blocks;
}

int64_t RowProgram::arena_bytes(int64_t rows) const {
  int64_t bytes = align64(floats_ * rows * 4);
  for (int64_t codes : lane_codes_) bytes += align64(Scratch(rows, codes_[codes].k, codes_[codes].wide).bytes);
  return bytes;
}

uint8_t* RowProgram::codes_at(const Frame& frame, int64_t codes) const {
  uint8_t* place = frame.arena + align64(floats_ * frame.rows * 4);
  for (int64_t lane = 0; lane < codes_[codes].lane; lane++) {
    const Codes& widest = codes_[lane_codes_[lane]];
    place += align64(Scratch(frame.rows, widest.k, widest.wide).bytes);
  }
  return place;
}

int64_t RowProgram::stride(int64_t reg) const {
  const RowRegister& it = registers_[reg];
  return it.memory != nullptr ? it.width : padded(it.width);
}

float* RowProgram::row(const Frame& frame, int64_t reg, int64_t i) const {
  const RowRegister& it = registers_[reg];
  if (it.memory != nullptr) return it.memory + (frame.m0 + i) * it.width;
  return reinterpret_cast<float*>(frame.arena) + offsets_[reg] * frame.rows + i * padded(it.width);
}

void RowProgram::run(uint8_t* arena, int64_t m0, int64_t m1) const {
  const Frame frame{arena, m0, m1 - m0};
  for (const Stage& stage : stages_) run_stage(frame, stage, 0, parts_of(stage, frame.rows));
}

int64_t RowProgram::parts(int64_t stage) const { return parts_of(stages_[stage], m_); }

void RowProgram::run_parts(uint8_t* arena, int64_t stage, int64_t begin, int64_t end) const {
  run_stage({arena, 0, m_}, stages_[stage], begin, end);
}

int64_t RowProgram::tile_columns(const Stage& stage) const {
  return registers_[code_[stage.steps.front().instruction].dst].width >= 512 ? 64 : 32;
}

int64_t RowProgram::parts_of(const Stage& stage, int64_t rows) const {
  if (!stage.is_linear) return (rows + kChunk - 1) / kChunk;
  const int64_t columns = tile_columns(stage);
  return (registers_[code_[stage.steps.front().instruction].dst].width + columns - 1) / columns;
}

void RowProgram::run_stage(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const {
  stage.is_linear ? run_columns(frame, stage, begin, end) : run_rows(frame, stage, begin, end);
}

void RowProgram::run_rows(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const {
  for (int64_t i = begin * kChunk; i < std::min(end * kChunk, frame.rows); i += kChunk) {
    const int64_t rows = std::min(kChunk, frame.rows - i);
    for (const Step& step : stage.steps) {
      const RowInstruction& it = code_[step.instruction];
      if (step.codes < 0) {
        apply(frame, it, i, rows, 0, registers_[it.dst].width);
        continue;
      }
      const Codes& codes = codes_[step.codes];
      const float* x = row(frame, codes.source, 0);
      uint8_t* scratch = codes_at(frame, step.codes);
      if (codes.steps < 0)
        fxquant_quantize_rows(x, stride(codes.source), i, i + rows, codes.k, codes.weight_bits, codes.act_bits, scratch,
                              frame.rows);
      else
        fxquant_quantize_rows_static(x, stride(codes.source), i, i + rows, codes.k, codes.weight_bits, codes.act_bits,
                                     params_[codes.steps], reinterpret_cast<const int32_t*>(params_[codes.steps + 1]),
                                     scratch, frame.rows);
    }
  }
}

void RowProgram::run_columns(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const {
  const RowInstruction& linear = code_[stage.steps.front().instruction];
  const int64_t n = registers_[linear.dst].width, columns = tile_columns(stage), ldo = stride(linear.dst);
  const uint8_t* codes = codes_at(frame, stage.steps.front().codes);
  for (int64_t n0 = begin * columns; n0 < std::min(end * columns, n); n0 += columns) {
    const int64_t n1 = std::min(n0 + columns, n);
    float* out = row(frame, linear.dst, 0) + n0;
    fxquant_linear_tile(codes, frame.rows, packed_[linear.b], 0, frame.rows, n0, n1, out, ldo);
    if (linear.first >= 0)
      functions_.of[kAdd]({out, out, params_[linear.first] + n0, nullptr, ldo, ldo, 0, frame.rows, n1 - n0, 0.f});
    for (size_t s = 1; s < stage.steps.size(); s++)
      apply(frame, code_[stage.steps[s].instruction], 0, frame.rows, n0, n1);
  }
}

void RowProgram::apply(const Frame& frame, const RowInstruction& it, int64_t i, int64_t rows, int64_t n0, int64_t n1) const {
  const auto param = [&](int64_t index) { return index < 0 ? nullptr : params_[index] + n0; };
  RowOperands o{row(frame, it.dst, i) + n0, row(frame, it.a, i) + n0, nullptr, nullptr, stride(it.dst), stride(it.a), 0,
                rows, n1 - n0, 0.f};
  if (it.op == kAdd || it.op == kMul) {
    o.b = row(frame, it.b, i) + n0;
    o.stride_b = stride(it.b);
  } else if (it.op == kAddRow || it.op == kMulRow) {
    o.b = param(it.first);
  } else if (it.op == kLayerNorm || it.op == kRmsNorm) {
    o.b = param(it.first);
    o.c = it.op == kLayerNorm ? param(it.second) : nullptr;
    o.eps = constants_[it.third];
  }
  functions_.of[it.op](o);
}

}  // namespace fxquant
