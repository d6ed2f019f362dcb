// A row program: a chain of row-wise work (linears, norms, activations, sums, products) on a block of rows in cache, as
// stages. No torch headers. fxquant/reference/rows.py says what a program computes; every instruction set gives its bits.
#pragma once
#include <cstdint>
#include <vector>

namespace fxquant {

// The order is that of fxquant/ops/program.py.
enum RowOp : int64_t {
  kLinear,     // dst = linear(a), packed weight b; first: bias or -1; second, third: bits of weight and activation
  kLinearStatic,  // the same; second: steps, with the zero point right after them; third: bits of the activation
  kLayerNorm,  // dst = layer_norm(a); first, second: weight and bias or -1; third: index of eps
  kRmsNorm,    // dst = rms_norm(a); first: weight or -1; third: index of eps
  kGeluErf,
  kGeluTanh,
  kSilu,
  kRelu,
  kAdd,     // dst = a + b
  kMul,     // dst = a * b
  kAddRow,  // dst = a + params[first], the same for every row
  kMulRow,
  kRowOps
};

struct RowInstruction {
  int64_t op, dst, a, b, first, second, third;
};
constexpr int64_t kFields = sizeof(RowInstruction) / sizeof(int64_t);

// Operands of a row function: y, a and b are [rows][n] with a stride each; b and c of a norm are its weight and bias.
struct RowOperands {
  float* y;
  const float *a, *b, *c;
  int64_t stride_y, stride_a, stride_b, rows, n;
  float eps;
};
using RowFn = void (*)(const RowOperands&);
struct RowFunctions {
  RowFn of[kRowOps];  // by RowOp; none for the linears
};
extern const RowFunctions kRowsScalar, kRowsAvx2, kRowsAvx512;

// Values of `width` floats a row: in the arena (memory is null), or an input or output [m][width].
struct RowRegister {
  int64_t width;
  float* memory;
};

// The arguments of fxquant_rows (program.h).
struct RowLists {
  const float* const* inputs;
  const uint8_t* const* packed;
  const void* const* params;
  float* const* outputs;
  const int64_t* registers;
  int64_t register_count;
  const int64_t* program;
  int64_t instruction_count;
  const double* constants;
  const int64_t* output_registers;
  int64_t output_count;
};

class RowProgram {
 public:
  RowProgram(int64_t m, std::vector<RowRegister> registers, std::vector<RowInstruction> code,
             const uint8_t* const* packed, const void* const* params, const double* constants);
  RowProgram(int64_t m, const RowLists& lists);

  // Rows that a thread takes through the whole program at once; all of them where columns are split instead.
  int64_t block_rows(int64_t threads) const;
  // With few rows the threads share the columns of each linear; the bits are the same.
  bool splits_columns(int64_t threads) const { return m_ < threads * 8; }
  int64_t arena_bytes(int64_t rows) const;

  // Every stage on rows m0 <= i < m1.
  void run(uint8_t* arena, int64_t m0, int64_t m1) const;
  // One stage on all rows, in parts that may run side by side.
  int64_t stages() const { return static_cast<int64_t>(stages_.size()); }
  int64_t parts(int64_t stage) const;
  void run_parts(uint8_t* arena, int64_t stage, int64_t begin, int64_t end) const;

 private:
  // Codes of a register's rows, shared by every linear that reads it at one activation width.
  struct Codes {
    int64_t source, version, k, last, lane;
    int32_t weight_bits, act_bits;
    bool wide;
    int64_t steps;  // index of static steps; -1: each row has its own scale
  };
  // An instruction. codes: what a linear reads; in a stage on whole rows, the quantization that makes them; else -1.
  struct Step {
    int64_t instruction, codes;
  };
  // Linears of one width with the elementwise work on their columns, or work on whole rows.
  struct Stage {
    int64_t width;  // columns, in tiles that do not depend on each other; 0: whole rows
    std::vector<Step> steps;
  };
  struct Frame {
    uint8_t* arena;
    int64_t m0, rows;
  };

  void add_stages();
  void add_linear(int64_t index, const std::vector<int64_t>& versions);
  void assign_lanes();
  float* row(const Frame& frame, int64_t reg, int64_t i) const;
  int64_t stride(int64_t reg) const;
  uint8_t* codes_at(const Frame& frame, int64_t codes) const;
  const float* vector(int64_t param) const { return static_cast<const float*>(params_[param]); }
  void run_stage(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const;
  void run_rows(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const;
  void run_columns(const Frame& frame, const Stage& stage, int64_t begin, int64_t end) const;
  void apply(const Frame& frame, const RowInstruction& it, int64_t i, int64_t rows, int64_t n0, int64_t n1) const;
  int64_t parts_of(const Stage& stage, int64_t rows) const;

  int64_t m_;
  std::vector<RowRegister> registers_;
  std::vector<RowInstruction> code_;
  const uint8_t* const* packed_;
  const void* const* params_;
  const double* constants_;
  std::vector<int64_t> offsets_;  // of a register in the arena, in floats a row
  std::vector<int64_t> lane_codes_;  // the widest codes of each lane of scratch memory
  std::vector<Codes> codes_;
  std::vector<Stage> stages_;
  int64_t floats_ = 0;  // arena floats a row
  const RowFunctions& functions_;
};

}  // namespace fxquant
