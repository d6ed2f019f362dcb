// Packs streamed weights, prepares rows, and drives the decode kernels of the instruction set in force.
#include "stream.h"

#include "isa.h"
#include "stream_layout.h"

#include <algorithm>
#include <cstring>
#include <memory>

using namespace fxquant;
using namespace fxquant::stream;

namespace {

// A CPU with AVX-VNNI runs the AVX2 kernels: reading the weights from memory sets the pace, not the products.
constexpr const StreamKernels* kStream[] = {&kStreamScalar, &kStreamAvx2, &kStreamAvx2, &kStreamAvx512Vnni};

const StreamKernels& in_force() { return *kStream[fxquant_isa()]; }

const StreamHeader& header_of(const uint8_t* packed) { return *reinterpret_cast<const StreamHeader*>(packed); }

const uint8_t* panel_of(const uint8_t* packed, const StreamLayout& l, int64_t p) {
  return packed + l.panel_at(p);
}

const float* table_of(const uint8_t* packed) { return reinterpret_cast<const float*>(packed + kHeaderBytes); }

int64_t kind_of(int64_t bits) { return bits == 2 ? 0 : bits == 4 ? 1 : 2; }

// What the masks of a word's fields leave their codes shifted up, as the factor that takes it out of x: a power of two.
void field_scales(const StreamLayout& l, float* scale) {
  for (int64_t k = 0; k < l.step_k; k++) {
    const int64_t field = k % 4 * (l.step_k / 4) + k / 4;  // of the word, from its lowest bits up
    const bool is_shifted = l.bits != 8 && !l.has_table && in_force().masks_in_place;
    scale[k] = is_shifted ? std::ldexp(1.f, static_cast<int>(-l.bits * (field % (l.step_k / 2)))) : 1.f;
  }
}

void prepare_float(const float* x, const StreamLayout& l, const float* scale, float* to, float* corrections) {
  const int64_t whole = l.k / l.step_k * l.step_k;
  for (int64_t k = 0; k < whole; k += l.step_k)
    for (int64_t i = 0; i < l.step_k; i++) to[k + i] = x[k + i] * scale[i];
  for (int64_t k = whole; k < l.padded_k(); k++) to[k] = k < l.k ? x[k] * scale[k - whole] : 0.f;
  for (int64_t g = 0; g < l.groups; g++) {
    float lanes[8] = {};
    const int64_t end = std::min(l.k, (g + 1) * l.group);
    int64_t k = g * l.group;
    for (; k + 8 <= end; k += 8)
      for (int64_t j = 0; j < 8; j++) lanes[j] += x[k + j];
    for (; k < end; k++) lanes[0] += x[k];
    const float sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    corrections[g] = l.bias() == 0 ? 0.f : -static_cast<float>(l.bias()) * sum;
  }
}

// Codes 0 .. 255 become s = q - 128, so that sum (q - z) w = sum (w + b) s - b sum s + (128 - z) sum w, exactly.
void prepare_integer(const float* x, const StreamLayout& l, int8_t* codes, int32_t* corrections, float* scale, int32_t* shift) {
  int32_t zero_point = 0;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(codes);
  quantize_row(x, l.k, 255, bytes, scale, &zero_point);
  for (int64_t k = 0; k < l.k; k++) bytes[k] ^= 0x80;
  std::memset(bytes + l.k, 0, l.padded_k() - l.k);
  for (int64_t g = 0; g < l.groups; g++) {
    int32_t sum = 0;
    const int64_t end = std::min(l.padded_k(), (g + 1) * l.group);
    for (int64_t k = g * l.group; k < end; k++) sum += codes[k];
    corrections[g] = -static_cast<int32_t>(l.bias()) * sum;
  }
  *shift = 128 - zero_point;
}

IntegerRows rows_in(const uint8_t* scratch, const StreamLayout& l, int64_t m, int64_t first) {
  const StreamScratch s(l, m);
  return {reinterpret_cast<const int8_t*>(scratch + s.codes) + first * s.stride, s.stride,
          reinterpret_cast<const int32_t*>(scratch + s.corrections) + first * l.groups,
          reinterpret_cast<const int32_t*>(scratch + s.shifts) + first, reinterpret_cast<const float*>(scratch) + first};
}

FloatRows floats_in(const uint8_t* scratch, const StreamLayout& l, int64_t m, int64_t first) {
  const StreamScratch s(l, m);
  const int64_t stride = s.stride / 4;
  return {reinterpret_cast<const float*>(scratch + s.codes) + first * stride, stride,
          reinterpret_cast<const float*>(scratch + s.corrections) + first * l.groups};
}

// Panel p against 1 to kPass rows.
void pass(
    const uint8_t* scratch, const StreamLayout& l, const uint8_t* packed, int64_t p, int64_t m, int64_t first, int64_t rows,
    float* out) {
  const uint8_t* panel = panel_of(packed, l, p);
  if (l.has_table)
    in_force().rows_table[rows - 1](floats_in(scratch, l, m, first), panel, l, table_of(packed), out);
  else if (l.is_integer)
    in_force().rows_integer[rows - 1](rows_in(scratch, l, m, first), panel, l, out, nullptr);
  else
    in_force().rows_float[kind_of(l.bits)][rows - 1](floats_in(scratch, l, m, first), panel, l, out);
}

// Header, codes, scales and sums; `out` is zero and of the layout's size.
void write_panels(const int8_t* codes, const float* scales, const StreamLayout& l, const StreamHeader& header, uint8_t* out) {
  std::memcpy(out, &header, sizeof header);
  for (int64_t p = 0; p < l.panels; p++) {
    uint8_t* panel = out + l.panel_at(p);
    for (int64_t c = 0; c < kPanel; c++) {
      const int64_t j = p * kPanel + c;
      for (int64_t i = 0; i < l.padded_k(); i++) {
        const int64_t code = j < l.n && i < l.k ? codes[j * l.k + i] : 0;
        const Place place(l.bits, i % l.step_k, c);
        panel[l.step_at(i / l.step_k) + place.byte] |= static_cast<uint8_t>((code + l.bias()) << place.shift);
      }
      for (int64_t g = 0; g < l.groups && j < l.n; g++) {
        float* tail = reinterpret_cast<float*>(panel + l.tail_at(g));
        tail[c] = scales[j * l.groups + g];
        if (!l.is_integer) continue;
        int32_t sum = 0;
        for (int64_t i = g * l.group; i < std::min(l.k, (g + 1) * l.group); i++) sum += codes[j * l.k + i];
        if (l.has_wide_sums)
          reinterpret_cast<int32_t*>(tail + kPanel)[c] = sum;
        else
          reinterpret_cast<int16_t*>(tail + kPanel)[c] = static_cast<int16_t>(sum);
      }
    }
  }
}

}  // namespace

extern "C" int64_t fxquant_stream_packed_bytes(int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int32_t group) {
  return StreamLayout(n, k, weight_bits, act_bits, group).bytes;
}

extern "C" int64_t fxquant_stream_columns(const uint8_t* packed) { return header_of(packed).n; }

extern "C" int64_t fxquant_stream_features(const uint8_t* packed) { return header_of(packed).k; }

extern "C" int32_t fxquant_stream_pack(
    const int8_t* codes, const float* scales, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int32_t group,
    uint8_t* out) {
  const StreamLayout l(n, k, weight_bits, act_bits, group);
  const int32_t end = 1 << (weight_bits - 1);  // every number of the width is a code, -end too
  if (std::any_of(codes, codes + n * k, [&](int8_t code) { return code < -end || code >= end; })) return 1;
  std::memset(out, 0, l.bytes);
  write_panels(codes, scales, l, {kStreamMagic, kStreamVersion, n, k, weight_bits, act_bits, group, 0}, out);
  return 0;
}

extern "C" int64_t fxquant_stream_table_bytes(int64_t n, int64_t k, int32_t group) {
  return StreamLayout(n, k, 4, 16, group, true).bytes;
}

extern "C" int32_t fxquant_stream_pack_table(
    const int8_t* codes, const float* values, const float* scales, int64_t n, int64_t k, int32_t group, uint8_t* out) {
  const StreamLayout l(n, k, 4, 16, group, true);
  if (std::any_of(codes, codes + n * k, [](int8_t code) { return code < 0 || code > 15; })) return 1;
  std::memset(out, 0, l.bytes);
  std::memcpy(out + kHeaderBytes, values, kTableBytes);
  write_panels(codes, scales, l, {kStreamMagic, kStreamVersion, n, k, 4, 16, group, 1}, out);
  return 0;
}

extern "C" void fxquant_stream_unpack(const uint8_t* packed, int8_t* codes, float* scales) {
  const StreamLayout l(header_of(packed));
  for (int64_t j = 0; j < l.n; j++) {
    const uint8_t* panel = panel_of(packed, l, j / kPanel);
    for (int64_t i = 0; i < l.k; i++) {
      const Place place(l.bits, i % l.step_k, j % kPanel);
      const uint8_t byte = panel[l.step_at(i / l.step_k) + place.byte];
      codes[j * l.k + i] = static_cast<int8_t>(((byte >> place.shift) & ((1 << l.bits) - 1)) - l.bias());
    }
    for (int64_t g = 0; g < l.groups; g++)
      scales[j * l.groups + g] = reinterpret_cast<const float*>(panel + l.tail_at(g))[j % kPanel];
  }
}

extern "C" int64_t fxquant_stream_scratch_bytes(const uint8_t* packed, int64_t m) {
  return StreamScratch(StreamLayout(header_of(packed)), m).bytes;
}

extern "C" void fxquant_stream_tiles(
    const uint8_t* packed, int64_t m, int64_t* threads, int64_t* rows, int64_t* columns) {
  constexpr int64_t kBytesPerThread = 32768;  // a thread that reads less than this costs more to wake than it saves
  const StreamLayout l(header_of(packed));
  const int64_t work = l.panels * l.panel_bytes * std::max<int64_t>(1, m / 4);
  *threads = std::clamp<int64_t>(work / kBytesPerThread, 1, std::max<int64_t>(1, *threads));
  *rows = even_share(std::max<int64_t>(m, 1), kRowBlock);
  *columns = kPanel;
}

extern "C" void fxquant_stream_prepare(
    const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t m, const uint8_t* packed, uint8_t* scratch) {
  const StreamLayout l(header_of(packed));
  const StreamScratch s(l, m);
  if (l.is_integer) {
    for (int64_t i = m0; i < m1; i++)
      prepare_integer(x + i * ldx, l, reinterpret_cast<int8_t*>(scratch + s.codes + i * s.stride),
                      reinterpret_cast<int32_t*>(scratch + s.corrections) + i * l.groups, reinterpret_cast<float*>(scratch) + i,
                      reinterpret_cast<int32_t*>(scratch + s.shifts) + i);
  } else {
    float scale[16];
    field_scales(l, scale);
    for (int64_t i = m0; i < m1; i++)
      prepare_float(x + i * ldx, l, scale, reinterpret_cast<float*>(scratch + s.codes + i * s.stride),
                    reinterpret_cast<float*>(scratch + s.corrections) + i * l.groups);
  }
}

extern "C" void fxquant_stream_run(
    const float*, int64_t, const uint8_t* scratch, int64_t m, const uint8_t* packed, const float* bias, int64_t m0, int64_t m1,
    int64_t n0, int64_t n1, float* out, int64_t ldo) {
  const StreamLayout l(header_of(packed));
  alignas(64) float sums[kPass * kPanel];
  for (int64_t block = m0; block < m1; block += kRowBlock) {
    const int64_t end = std::min(m1, block + kRowBlock), height = even_share(end - block, kPass);
    for (int64_t j = n0; j < n1; j += kPanel) {
      const int64_t columns = std::min(kPanel, n1 - j);
      for (int64_t i = block; i < end; i += height) {
        const int64_t rows = std::min(height, end - i);
        pass(scratch, l, packed, j / kPanel, m, i, rows, sums);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = 0; c < columns; c++)
            out[(i - m0 + r) * ldo + (j - n0) + c] = bias == nullptr ? sums[r * kPanel + c] : sums[r * kPanel + c] + bias[j + c];
      }
    }
  }
}

extern "C" void fxquant_stream_sums(const uint8_t* scratch, int64_t m, const uint8_t* packed, int32_t* out) {
  const StreamLayout l(header_of(packed));
  float unused[kPass * kPanel];
  const std::unique_ptr<int32_t[]> sums(new int32_t[kPass * l.groups * kPanel]);
  for (int64_t i = 0; i < m; i += kPass) {
    const int64_t rows = std::min(kPass, m - i);
    for (int64_t j = 0; j < l.n; j += kPanel) {
      in_force().rows_integer[rows - 1](rows_in(scratch, l, m, i), panel_of(packed, l, j / kPanel), l, unused, sums.get());
      for (int64_t r = 0; r < rows * l.groups; r++)
        std::copy_n(sums.get() + r * kPanel, std::min(kPanel, l.n - j), out + (i * l.groups + r) * l.n + j);
    }
  }
}

extern "C" void fxquant_stream_linear(
    const float* x, int64_t ldx, int64_t m, const uint8_t* packed, const float* bias, int64_t n0, int64_t n1, float* out,
    int64_t ldo) {
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[fxquant_stream_scratch_bytes(packed, m)]);
  fxquant_stream_prepare(x, ldx, 0, m, m, packed, scratch.get());
  fxquant_stream_run(x, ldx, scratch.get(), m, packed, bias, 0, m, n0, n1, out, ldo);
}
