// Layout of a packed weight and of the scratch memory; the table of kernels that each instruction set fills in.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fxquant {

constexpr int64_t kPanel = 16;  // columns of a panel
constexpr int64_t kStep = 4;    // k values of a step: one step of a panel is 64 bytes, [16 columns][4 k]
constexpr uint32_t kMagic = 0x4c515846;  // "FXQL"
constexpr uint32_t kVersion = 1;
constexpr int64_t kMaxRows = 14;  // most rows of one micro-kernel call

// A quotient beyond this is clipped whatever the zero point: clipping it in float keeps conversions to int in range.
constexpr float kFarthest = 256.f;

// Codes of a row, to a whole step.
constexpr int64_t padded_features(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int32_t kMinBits = 4, kMaxBits = 8;
constexpr bool is_width(int64_t bits) { return kMinBits <= bits && bits <= kMaxBits; }

// Largest magnitude that a 16-bit lane gains in a step, when it adds two products: (2^a - 1) * 2 * (2^(w-1) - 1).
constexpr int64_t largest_pair(int32_t weight_bits, int32_t act_bits) {
  return ((int64_t{1} << act_bits) - 1) * ((int64_t{1} << weight_bits) - 2);
}
// Products are summed in 16 bits up to 15 bits in all.
constexpr bool has_schedule(int32_t weight_bits, int32_t act_bits) { return weight_bits + act_bits <= 15; }
// Steps that no input can overflow, whatever the weights: over T steps a lane spans at most T * largest_pair, and a
// centred accumulator holds a span of 65535. Every segment but a panel's last is at least this long.
constexpr int64_t min_segment(int32_t weight_bits, int32_t act_bits) { return 65535 / largest_pair(weight_bits, act_bits); }

// Proof for every width pair: vpmaddubsw does not saturate, and a step always fits. 15 bits in all give at most
// 2^15 - 2^(a+1) - 2^w + 2 < 32767; 8 x 8 bits would saturate (64770).
constexpr bool pairs_are_exact() {
  for (int32_t w = kMinBits; w <= kMaxBits; w++)
    for (int32_t a = kMinBits; a <= kMaxBits; a++)
      if (has_schedule(w, a) != (largest_pair(w, a) <= 32767) || (has_schedule(w, a) && min_segment(w, a) < 2)) return false;
  return true;
}
static_assert(pairs_are_exact());

struct Header {
  uint32_t magic, version;
  int64_t n, k;
  int32_t weight_bits, act_bits;
};

// More input features could overflow an int32 sum of 8 x 8-bit products.
constexpr int64_t kMaxFeatures = (int64_t{1} << 31) / (255 * 127);

// Offsets of the sections of a packed weight, each 64-byte aligned.
struct Layout {
  int64_t n, k, panels, steps, capacity;
  int64_t weights, scales, sums, counts, starts, lengths, centres, bytes;

  Layout(int64_t n_, int64_t k_, int32_t weight_bits, int32_t act_bits)
      : n(n_), k(k_), panels((n_ + kPanel - 1) / kPanel), steps((k_ + kStep - 1) / kStep) {
    const int64_t shortest = has_schedule(weight_bits, act_bits) ? min_segment(weight_bits, act_bits) : 0;
    capacity = shortest ? (steps + shortest - 1) / shortest : 0;
    weights = 64;
    scales = weights + panels * steps * 64;
    sums = scales + panels * 64;
    counts = sums + panels * 64;                                  // int32 [panels]: segments of a panel
    starts = counts + align64(panels * 4);                        // int32 [panels][16]: minus the sum of all centres
    lengths = starts + (capacity ? panels * 64 : 0);              // uint16 [panels][capacity]
    centres = lengths + align64(panels * capacity * 2);           // int16 [panels][capacity][32 lanes]
    bytes = centres + panels * capacity * 64;
  }
  explicit Layout(const Header& h) : Layout(h.n, h.k, h.weight_bits, h.act_bits) {}
};

// Scratch memory of m quantized rows: scale float [m], zero point int32 [m], codes [m][stride].
struct Scratch {
  int64_t zero_points, codes, stride, bytes;

  // wide: codes are 16 bits (AVX2 has no exact 8 x 8-bit product).
  Scratch(int64_t m, int64_t k, bool wide) {
    zero_points = align64(m * 4);
    codes = 2 * zero_points;
    // An odd number of cache lines: rows a power of two apart would fall into one set of the first-level cache.
    stride = align64(padded_features(k) * (wide ? 2 : 1)) | 64;
    bytes = codes + m * stride;
  }
};

// One panel, or a pair of neighbours, against rows of codes (row stride in bytes): sums int32 [panels][rows][16].
using PanelFn = void (*)(
    const uint8_t* codes, int64_t stride, int64_t rows, const uint8_t* packed, const Layout& layout, int64_t panel,
    int32_t* sums);
// Lowest and highest value of a row, zero among them; false where a value is not finite.
using ExtentFn = bool (*)(const float* x, int64_t k, float* low, float* high);
// clip(rne(x / scale) + zero_point, 0, qmax) of a finite row, padded with zeros to a whole step; scale >= FLT_MIN and
// |x| < 2^60 * scale.
using EncodeFn = void (*)(
    const float* x, int64_t k, int32_t qmax, float scale, int32_t zero_point, uint8_t* codes);
// clip(rne(x[j] / steps[j]) + zero_point, 0, qmax), padded alike; false, with codes that mean nothing, where a value is not
// finite. The row is read once: static qparams need no extent.
using EncodeChannelsFn = bool (*)(
    const float* x, int64_t k, int32_t qmax, const float* steps, int32_t zero_point, uint8_t* codes);
// out[i][j] = float(sums[i][j] - zero_point[i] * column_sum[j]) * (scale_x[i] * scale_w[j]) + bias[j]; bias may be null
using FinishFn = void (*)(
    const int32_t* sums, const int32_t* column_sums, const float* scale_w, const float* scale_x,
    const int32_t* zero_points, const float* bias, int64_t rows, int64_t columns, float* out, int64_t ldo);

struct Kernels {
  ExtentFn extent;
  EncodeFn encode;
  EncodeChannelsFn encode_channels;
  PanelFn panel_8x8;   // any scheme
  PanelFn panel_15;    // schemes with a schedule
  PanelFn pair;        // two panels, any scheme; null where one panel fills the registers
  FinishFn finish;
  int64_t rows_8x8, rows_15;  // most rows of one call
  bool wide_8x8;              // panel_8x8 reads 16-bit codes
};

extern const Kernels kScalar, kAvx2, kAvxVnni, kAvx512Vnni;

// The kernels of the instruction set in force.
const Kernels& kernels();
// One row: codes, padded with zeros to a whole step, with its own scale and zero point.
void quantize_row(const float* x, int64_t k, int32_t qmax, uint8_t* codes, float* scale, int32_t* zero_point);

// Whether the kernels in force keep the codes of a scheme in 16 bits.
bool is_wide(int32_t weight_bits, int32_t act_bits);

// Equal parts of `rows`, none above `most`.
inline int64_t even_share(int64_t rows, int64_t most) {
  const int64_t parts = (rows + most - 1) / most;
  return (rows + parts - 1) / parts;
}

}  // namespace fxquant
