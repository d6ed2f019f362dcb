// Turns a row program into stages and runs them on a block of rows.
#include "program_stages.h"

#include "isa.h"
#include "layout.h"
#include "linear.h"

#include <algorithm>
#include <cstring>

namespace fxquant {
namespace {

constexpr int64_t kArenaBudget = 800 << 10;  // of a second-level cache of 1 MiB, which weights pass through too
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

int64_t tile_columns(int64_t width) { return width >= 512 ? 64 : 32; }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

std::vector<RowRegister> registers_of(const RowLists& lists) {
  std::vector<RowRegister> made;
  made.reserve(lists.register_count);
  for (int64_t r = 0; r < lists.register_count; r++) {
    const int64_t width = lists.registers[2 * r], place = lists.registers[2 * r + 1];
    made.push_back({width, place < 0 ? nullptr : const_cast<float*>(lists.inputs[place])});  // no instruction writes it
  }
  for (int64_t k = 0; k < lists.output_count; k++) made[lists.output_registers[k]].memory = lists.outputs[k];
  return made;
}

std::vector<RowInstruction> code_of(const RowLists& lists) {
  std::vector<RowInstruction> made(lists.instruction_count);
  std::memcpy(made.data(), lists.program, made.size() * sizeof(RowInstruction));
  return made;
}

}  // namespace

RowProgram::RowProgram(int64_t m, std::vector<RowRegister> registers, std::vector<RowInstruction> code,
                       const uint8_t* const* packed, const void* const* params, const double* constants)
    : m_(m), registers_(std::move(registers)), code_(std::move(code)), packed_(packed), params_(params),
      constants_(constants), functions_(functions_in_force()) {
  offsets_.reserve(registers_.size());
  for (const RowRegister& reg : registers_) {
    offsets_.push_back(floats_);
    if (reg.memory == nullptr) floats_ += padded(reg.width);
  }
  add_stages();
  assign_lanes();
}

RowProgram::RowProgram(int64_t m, const RowLists& lists)
    : RowProgram(m, registers_of(lists), code_of(lists), lists.packed, lists.params, lists.constants) {}

// Elementwise work right after a linear, on as many columns, runs while the linear's tile is in L1.
void RowProgram::add_stages() {
  std::vector<int64_t> versions(registers_.size(), 0);
  for (int64_t i = 0; i < static_cast<int64_t>(code_.size()); i++) {
    const RowInstruction& it = code_[i];
    if (is_linear(it.op)) {
      add_linear(i, versions);
    } else {
      const bool fits = !stages_.empty() && (stages_.back().width == 0 ||
                                             (is_elementwise(it.op) && stages_.back().width == registers_[it.dst].width));
      if (!fits) stages_.push_back({0, {}});
      stages_.back().steps.push_back({i, -1});
    }
    versions[it.dst]++;
  }
}

// A linear whose codes are there joins the linear before it where both have the same columns: q, k and v, or a gate and
// what it multiplies, are one stage.
void RowProgram::add_linear(int64_t index, const std::vector<int64_t>& versions) {
  const RowInstruction& it = code_[index];
  const int32_t weight_bits = reinterpret_cast<const Header*>(packed_[it.b])->weight_bits;
  const int32_t act_bits = static_cast<int32_t>(it.third);
  const int64_t steps = it.op == kLinearStatic ? it.second : -1, width = registers_[it.dst].width;
  const bool wide = is_wide(weight_bits, act_bits);
  const auto holds = [&](const Codes& c) {
    return c.source == it.a && c.version == versions[it.a] && c.act_bits == act_bits && c.wide == wide &&
           c.steps == steps;
  };
  const auto found = std::find_if(codes_.begin(), codes_.end(), holds);
  const int64_t codes = found - codes_.begin();
  if (found == codes_.end()) {
    codes_.push_back({it.a, versions[it.a], registers_[it.a].width, index, 0, weight_bits, act_bits, wide, steps});
    if (stages_.empty() || stages_.back().width != 0) stages_.push_back({0, {}});
    stages_.back().steps.push_back({index, codes});
  }
  codes_[codes].last = index;
  if (stages_.back().width != width) stages_.push_back({width, {}});
  stages_.back().steps.push_back({index, codes});
}

// Codes that are not needed at the same time share memory.
void RowProgram::assign_lanes() {
  std::vector<int64_t> busy;  // the last instruction that reads a lane's codes
  for (const Stage& stage : stages_)
    for (const Step& step : stage.steps) {
      if (stage.width != 0 || step.codes < 0) continue;
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

int64_t RowProgram::parts_of(const Stage& stage, int64_t rows) const {
  if (stage.width == 0) return (rows + kChunk - 1) / kChunk;
  return (stage.width + tile_columns(stage.width) - 1) / tile_columns(stage.width);
}

void RowProgram::run_stage(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const {
  stage.width == 0 ? run_rows(frame, stage, begin, end) : run_columns(frame, stage, begin, end);
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
                                     vector(codes.steps), static_cast<const int32_t*>(params_[codes.steps + 1]), scratch,
                                     frame.rows);
    }
  }
}

void RowProgram::run_columns(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const {
  const int64_t columns = tile_columns(stage.width);
  for (int64_t n0 = begin * columns; n0 < std::min(end * columns, stage.width); n0 += columns) {
    const int64_t n1 = std::min(n0 + columns, stage.width);
    for (const Step& step : stage.steps) {
      const RowInstruction& it = code_[step.instruction];
      if (step.codes < 0) {
        apply(frame, it, 0, frame.rows, n0, n1);
        continue;
      }
      fxquant_linear_bias_tile(codes_at(frame, step.codes), frame.rows, packed_[it.b],
                               it.first < 0 ? nullptr : vector(it.first), 0, frame.rows, n0, n1,
                               row(frame, it.dst, 0) + n0, stride(it.dst));
    }
  }
}

void RowProgram::apply(const Frame& frame, const RowInstruction& it, int64_t i, int64_t rows, int64_t n0, int64_t n1) const {
  const auto param = [&](int64_t index) { return index < 0 ? nullptr : vector(index) + n0; };
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
    o.eps = static_cast<float>(constants_[it.third]);
  }
  functions_.of[it.op](o);
}

}  // namespace fxquant
