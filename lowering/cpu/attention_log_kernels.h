// Codes of operands, and weights from scores, as templates over the vector type of attention_kernels.h, which has here beside
// that: min (the second operand where one is NaN), div, rounded (whole numbers as int32 words, ties to even), store_words and
// look_up of words in a table, a short one of 16 entries (0 for codes beyond it) or a long one.
#pragma once
#include "attention_log_planes.h"
#include "attention_log_table.h"
#include "attention_softmax.h"

#include <cstdint>

namespace fxquant::attention {

namespace {

constexpr float kRoundCode = 12582912.f;  // adding it rounds to a whole number

template <typename V>
bool code_rows(const float* x, int64_t ld, int64_t rows, int64_t width, const float* scale, const float* low,
               const float* high, float* to) {
  constexpr int64_t L = V::kLanes;
  const V round = V::set1(kRoundCode), zero = V::set1(0.f);
  V seen = zero;
  const auto coded = [&](V value, int64_t c) {
    const V part = V::min(V::load(high + c), V::max(V::load(low + c), V::div(value, V::load(scale + c))));
    const V code = V::sub(V::add(part, round), round);
    seen = V::add(seen, V::mul(code, zero));
    return code;
  };
  for (int64_t r = 0; r < rows; r++, x += ld, to += width) {
    int64_t c = 0;
    for (; c + L <= width; c += L) V::store(to + c, coded(V::load(x + c), c));
    if (c < width) V::store_part(to + c, coded(V::load_part(x + c, width - c), c), width - c);
  }
  return V::sum(seen) != 0.f;  // a sum of zeros, or NaN
}

// 2^t for t <= 0 as exp2 has it, each operation rounded: the same bits everywhere.
template <typename V>
inline V exp2_rounded(V t) {
  const V magic = V::set1(1572864.f + 127.f);
  t = V::max(V::set1(-127.f), t);  // NaN stays
  const V n = V::add(t, magic);
  const V f = V::sub(t, V::sub(n, magic)), scale = V::eighths(n);
  const V p = V::add(V::mul(V::add(V::mul(f, V::set1(0x1.c6a004p-5f)), V::set1(0x1.ec0c32p-3f)), f), V::set1(0x1.62e432p-1f));
  return V::add(V::mul(V::mul(p, f), scale), scale);
}

// Sums in 16 lanes whatever the width of a vector.
template <typename V>
LogSum log_sum(float* s, int64_t count, int64_t padded) {
  constexpr int64_t L = V::kLanes;
  const float largest = V::front(highest<V>(s, count, padded));
  const V shift = V::set1(largest == kHidden ? 0.f : largest);
  V a = V::set1(0.f), b = a;
  for (int64_t j = 0; j < padded; j += 16) {
    a = V::add(a, exp2_rounded(V::sub(V::load(s + j), shift)));
    if constexpr (L == 8) b = V::add(b, exp2_rounded(V::sub(V::load(s + j + 8), shift)));
  }
  if constexpr (L == 8) a = V::add(a, b);
  return {largest, V::sum(a)};
}

template <typename V, bool kIsShort>
uint32_t weigh_row(float* s, int64_t padded, const LogRow& row, const LogTables& tables, float* others, int64_t stride,
                   int32_t* codes) {
  V greatest[kMostTables];
  for (int64_t plane = 1; plane < tables.count; plane++) greatest[plane] = V::set1(0.f);
  const V top = V::set1(row.lse), by = V::set1(row.factor), most = V::set1(row.zero), least = V::set1(0.f);
  for (int64_t j = 0; j < padded; j += V::kLanes) {  // the operand order makes a NaN the code of zero
    const auto code = V::rounded(V::max(V::min(V::mul(by, V::sub(top, V::load(s + j))), most), least));
    if (codes != nullptr) V::store_words(codes + j, code);
    const auto weight = [&](const float* table) { return kIsShort ? V::look_up_short(table, code) : V::look_up(table, code); };
    V::store(s + j, weight(tables.first));
    for (int64_t plane = 1; plane < tables.count; plane++) {
      const V found = weight(tables.first + plane * tables.size);
      V::store(others + (plane - 1) * stride + j, found);
      greatest[plane] = V::max(greatest[plane], found);
    }
  }
  uint32_t used = 1;
  for (int64_t plane = 1; plane < tables.count; plane++)
    if (V::front(V::highest(greatest[plane])) > 0.f) used |= 1u << plane;
  return used;
}

template <typename V>
uint32_t weigh(float* s, int64_t padded, const LogRow& row, const LogTables& tables, float* others, int64_t stride,
               int32_t* codes) {
  const auto of_size = tables.size == kShortTable ? weigh_row<V, true> : weigh_row<V, false>;
  return of_size(s, padded, row, tables, others, stride, codes);
}

template <typename V>
void finish(const float* sums, int64_t stride, const float* units, int64_t count, const float* scale, int64_t width, float* to) {
  constexpr int64_t L = V::kLanes;
  const auto value = [&](int64_t c) {
    V y = V::mul(V::load(sums + c), V::set1(units[0]));
    for (int64_t plane = 1; plane < count; plane++)
      y = V::add(y, V::mul(V::load(sums + plane * stride + c), V::set1(units[plane])));
    return V::mul(y, V::load(scale + c));
  };
  int64_t c = 0;
  for (; c + L <= width; c += L) V::store(to + c, value(c));
  if (c < width) V::store_part(to + c, value(c), width - c);
}

template <typename V>
constexpr LogKernels log_kernels() {
  return {code_rows<V>, log_sum<V>, weigh<V>, finish<V>};
}

}  // namespace

}  // namespace fxquant::attention
