// The C interface of row programs: what generated code and the operator fxquant::rows call. No torch headers.
#pragma once
#include <cstdint>

#ifndef FXQUANT_EXPORT
#define FXQUANT_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {
// One call of fxquant::rows on m rows, in parallel. The lists are the operator's (fxquant/ops/program.py), as arrays:
// registers holds pairs (width, place), program seven integers an instruction, output_registers the register of each
// output. inputs and outputs are dense [m][width]; a param is a float vector, or the int32 zero point of a static linear.
// Nothing is checked here: the operator's checks must hold.
FXQUANT_EXPORT void fxquant_rows(
    int64_t m, const float* const* inputs, const uint8_t* const* packed, const void* const* params, float* const* outputs,
    const int64_t* registers, int64_t register_count, const int64_t* program, int64_t instruction_count,
    const double* constants, const int64_t* output_registers, int64_t output_count);
}
