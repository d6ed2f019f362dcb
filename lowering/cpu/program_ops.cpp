// The operator fxquant::rows on torch's stable ABI. Its schema is defined in Python (fxquant/ops/program.py).
#include "layout.h"
#include "program.h"
#include "program_stages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace fxquant;

namespace {

struct FreeAligned {
  void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// Scratch memory of the calling thread. It is kept from call to call: fresh pages would cost more than a small program.
uint8_t* arena(int64_t bytes) {
  thread_local std::unique_ptr<uint8_t[], FreeAligned> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();  // before the new one is made
    size = 0;
    memory.reset(static_cast<uint8_t*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t{64})));
    size = bytes;
  }
  return memory.get();
}

void run(const RowProgram& program, int64_t m) {
  if (m == 0) return;
  const int64_t threads = torch::stable::get_num_threads(), block = program.block_rows(threads);
  if (program.splits_columns(threads)) {
    uint8_t* shared = arena(program.arena_bytes(m));
    for (int64_t stage = 0; stage < program.stages(); stage++)
      torch::stable::parallel_for(0, program.parts(stage), 1, [&](int64_t begin, int64_t end) {
        program.run_parts(shared, stage, begin, end);
      });
    return;
  }
  torch::stable::parallel_for(0, (m + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    uint8_t* own = arena(program.arena_bytes(block));
    for (int64_t b = begin; b < end; b++) program.run(own, b * block, std::min((b + 1) * block, m));
  });
}

Tensor contiguous_float(const Tensor& tensor, const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "fxquant::rows: every ", what, " must be float32");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The arguments of one call, checked: nothing that stands in a program is trusted.
class Call {
 public:
  std::vector<Tensor> inputs, params, outputs;
  std::vector<const uint8_t*> packed;
  std::vector<Header> headers;
  std::vector<RowRegister> registers;
  std::vector<bool> is_input;  // of each register
  std::vector<RowInstruction> code;
  size_t constant_count = 0;
  int64_t m = 0;

  void take_inputs(const std::vector<Tensor>& given) {
    STD_TORCH_CHECK(!given.empty(), "fxquant::rows: there must be an input");
    for (const Tensor& tensor : given) {
      STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) > 0, "fxquant::rows: an input must have columns");
      inputs.push_back(contiguous_float(tensor, "input"));
      const int64_t rows = tensor.numel() / tensor.size(tensor.dim() - 1);
      STD_TORCH_CHECK(inputs.size() == 1 || rows == m, "fxquant::rows: inputs of ", m, " and of ", rows, " rows");
      m = rows;
    }
  }

  void take_weights(const std::vector<Tensor>& given, const std::vector<Tensor>& vectors) {
    for (const Tensor& blob : given) {
      Header header{};
      const bool is_blob = blob.scalar_type() == ScalarType::Byte && blob.is_contiguous() && blob.numel() >= 64;
      STD_TORCH_CHECK(is_blob, "fxquant::rows: a packed weight must be a contiguous vector of uint8");
      packed.push_back(static_cast<const uint8_t*>(blob.data_ptr()));
      std::memcpy(&header, packed.back(), sizeof header);
      STD_TORCH_CHECK(header.magic == kMagic && header.version == kVersion && blob.numel() == Layout(header).bytes,
                      "fxquant::rows: this is no packed weight of this version");
      headers.push_back(header);
    }
    for (const Tensor& vector : vectors) {
      const bool is_zero_point = vector.scalar_type() == ScalarType::Int && vector.numel() == 1;
      params.push_back(is_zero_point ? vector : contiguous_float(vector, "vector"));
    }
  }

  // registers: (width, place) each; place -1 is the arena, i an input. outputs: (register, input with its leading sizes).
  void take_registers(const std::vector<int64_t>& given, const std::vector<int64_t>& results) {
    STD_TORCH_CHECK(given.size() % 2 == 0 && results.size() % 2 == 0, "fxquant::rows: registers and outputs are pairs");
    for (size_t r = 0; r < given.size(); r += 2) {
      const int64_t width = given[r], place = given[r + 1];
      STD_TORCH_CHECK(width > 0 && place < static_cast<int64_t>(inputs.size()), "fxquant::rows: bad register");
      if (place >= 0)
        STD_TORCH_CHECK(inputs[place].size(inputs[place].dim() - 1) == width, "fxquant::rows: input ", place, " has ",
                        inputs[place].size(inputs[place].dim() - 1), " columns, its register ", width);
      is_input.push_back(place >= 0);
      registers.push_back({width, place < 0 ? nullptr : static_cast<float*>(inputs[place].data_ptr())});
    }
    for (size_t k = 0; k < results.size(); k += 2) {
      const int64_t like = results[k + 1];
      RowRegister& reg = registers[check(results[k], registers.size())];
      const Tensor& lead = inputs[check(like, inputs.size())];
      STD_TORCH_CHECK(reg.memory == nullptr && !is_input[results[k]], "fxquant::rows: an output needs a register of its own");
      std::vector<int64_t> sizes;
      for (int64_t d = 0; d + 1 < lead.dim(); d++) sizes.push_back(lead.size(d));
      sizes.push_back(reg.width);
      outputs.push_back(torch::stable::new_empty(lead, sizes));
      reg.memory = static_cast<float*>(outputs.back().data_ptr());
    }
  }

  void take_program(const std::vector<int64_t>& given, size_t constants) {
    constant_count = constants;
    STD_TORCH_CHECK(!given.empty() && given.size() % kFields == 0, "fxquant::rows: bad program");
    for (size_t i = 0; i < given.size(); i += kFields) {
      RowInstruction it{};
      std::memcpy(&it, given.data() + i, sizeof it);
      check(it.op, kRowOps);
      const int64_t n = registers[check(it.dst, registers.size())].width;
      const int64_t k = registers[check(it.a, registers.size())].width;
      STD_TORCH_CHECK(!is_input[it.dst], "fxquant::rows: an input is written");
      if (it.op == kLinear || it.op == kLinearStatic)
        check_linear(it, n, k);
      else
        check_float(it, n, k);
      code.push_back(it);
    }
  }

 private:
  static int64_t check(int64_t index, size_t size) {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(size), "fxquant::rows: ", index, " is out of range");
    return index;
  }
  void check_vector(int64_t index, int64_t n, bool optional) const {
    if (optional && index == -1) return;
    const Tensor& vector = params[check(index, params.size())];
    STD_TORCH_CHECK(vector.scalar_type() == ScalarType::Float && vector.numel() == n,
                    "fxquant::rows: a vector must have ", n, " float32 values");
  }
  void check_static(const RowInstruction& it, int64_t k) const {
    check_vector(it.second, k, false);
    const float* steps = static_cast<const float*>(params[it.second].data_ptr());
    for (int64_t i = 0; i < k; i++)
      STD_TORCH_CHECK(std::isnormal(steps[i]) && steps[i] > 0, "fxquant::rows: the step ", steps[i],
                      " is no positive normal number");
    const Tensor& zero = params[check(it.second + 1, params.size())];
    STD_TORCH_CHECK(zero.scalar_type() == ScalarType::Int, "fxquant::rows: steps must be followed by an int32 zero point");
    const int32_t value = *static_cast<const int32_t*>(zero.data_ptr());
    STD_TORCH_CHECK(value >= 0 && value < (1 << it.third), "fxquant::rows: the zero point ", value,
                    " does not fit ", it.third, " bits");
  }
  void check_linear(const RowInstruction& it, int64_t n, int64_t k) const {
    const Header& header = headers[check(it.b, headers.size())];
    const int64_t weight_bits = it.op == kLinear ? it.second : header.weight_bits;
    STD_TORCH_CHECK(header.n == n && header.k == k && header.weight_bits == weight_bits && header.act_bits == it.third,
                    "fxquant::rows: the weight was packed as w", header.weight_bits, "a", header.act_bits, " ", header.n,
                    " x ", header.k, ", the program asks for w", weight_bits, "a", it.third, " ", n, " x ", k);
    if (it.op == kLinearStatic) check_static(it, k);
    check_vector(it.first, n, true);
  }
  void check_float(const RowInstruction& it, int64_t n, int64_t k) const {
    STD_TORCH_CHECK(n == k, "fxquant::rows: ", k, " columns become ", n);
    if (it.op == kAdd || it.op == kMul) {
      STD_TORCH_CHECK(registers[check(it.b, registers.size())].width == n, "fxquant::rows: operands differ in width");
    } else if (it.op == kAddRow || it.op == kMulRow) {
      check_vector(it.first, n, false);
    } else if (it.op == kLayerNorm || it.op == kRmsNorm) {
      check(it.third, constant_count);
      check_vector(it.first, n, true);
      if (it.op == kLayerNorm) check_vector(it.second, n, true);
    }
  }
};

std::vector<Tensor> rows(const std::vector<Tensor> inputs, const std::vector<Tensor> packed,
                         const std::vector<Tensor> params, const std::vector<int64_t> registers,
                         const std::vector<int64_t> program, const std::vector<double> constants,
                         const std::vector<int64_t> outputs) {
  Call call;
  call.take_inputs(inputs);
  call.take_weights(packed, params);
  call.take_registers(registers, outputs);
  call.take_program(program, constants.size());
  std::vector<const void*> vectors;
  for (const Tensor& tensor : call.params) vectors.push_back(tensor.data_ptr());
  run(RowProgram(call.m, call.registers, call.code, call.packed.data(), vectors.data(), constants.data()), call.m);
  return call.outputs;
}

}  // namespace

extern "C" void fxquant_rows(
    int64_t m, const float* const* inputs, const uint8_t* const* packed, const void* const* params, float* const* outputs,
    const int64_t* registers, int64_t register_count, const int64_t* program, int64_t instruction_count,
    const double* constants, const int64_t* output_registers, int64_t output_count) {
  run(RowProgram(m, {inputs, packed, params, outputs, registers, register_count, program, instruction_count, constants,
                     output_registers, output_count}), m);
}

STABLE_TORCH_LIBRARY_IMPL(fxquant, CPU, m) { m.impl("rows", TORCH_BOX(&rows)); }
