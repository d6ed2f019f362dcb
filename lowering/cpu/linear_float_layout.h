// Layout of a float weight packed in panels, and the kernels that each instruction set fills in.
#pragma once
#include "layout.h"

namespace fxquant {

constexpr int64_t kFloatChunk = 384;         // k values of a panel that stay in L1: 24 KiB
constexpr uint32_t kFloatMagic = 0x46515846;  // "FXQF"
constexpr int64_t kFloatMaxRows = 12;        // most rows of one micro-kernel call

// Header (64 bytes), then float [panels][k][16]; columns beyond n are zero.
constexpr int64_t float_packed_bytes(int64_t n, int64_t k) { return 64 + (n + kPanel - 1) / kPanel * k * 64; }

// acc[r][c] (+)= sum over k values of x[r][k] w[k][c] for one panel, with acc in memory of row stride ldo, of which the
// first `columns` of 16 are read and written. Starts at `bias` where `first` (null: at zero), at what acc holds otherwise.
using FloatPanelFn = void (*)(
    const float* x, int64_t ldx, const float* w, int64_t k, const float* bias, bool first, int64_t columns, float* out,
    int64_t ldo);

struct FloatKernels {
  FloatPanelFn panel[kFloatMaxRows];  // by rows - 1; null above `rows`
  int64_t rows;
};

extern const FloatKernels kFloatScalar, kFloatAvx2, kFloatAvx512;

}  // namespace fxquant
