// Sigmoid attention over vectors V. Keys are taken in blocks, weights live in one strip of a few rows: there is no n x m
// buffer, and, as no weight depends on another, no running maximum or sum either.
#pragma once
#include "flash_sigmoid_kernels.h"
#include "flash_sigmoid_tile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace fxquant {
namespace {

constexpr int64_t kKeys = 256;  // keys of a block: its transpose and its values stay in the second-level cache
constexpr int64_t kQueries = 48;  // query rows of a strip in the backward pass

template <class V>
struct Sigmoid {
  using T = typename V::Number;
  static constexpr int64_t kPanel = 2 * V::kWidth, kRows = tile_rows<V>();

  const SigmoidHead& head;
  const T *q, *k, *v;
  const int64_t d, e, wide_d, wide_e;

  explicit Sigmoid(const SigmoidHead& h)
      : head(h), q(static_cast<const T*>(h.q)), k(static_cast<const T*>(h.k)), v(static_cast<const T*>(h.v)), d(h.d),
        e(h.e), wide_d(padded(h.d)), wide_e(padded(h.e)) {}

  static int64_t padded(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

  // Keys of the block at `begin` that some query below `last` may see.
  int64_t seen(int64_t begin, int64_t last) const {
    const int64_t end = head.causal ? std::min(head.m, last + head.m - head.n) : head.m;
    return std::clamp<int64_t>(end - begin, 0, kKeys);
  }

  // Rows [count, columns] -> panels [columns of x][panel of rows], missing rows 0: the right factor of a product with x
  // transposed.
  static void transpose(const T* x, int64_t row, int64_t column, int64_t count, int64_t columns, T* to) {
    for (int64_t p = 0; p < count; p += kPanel, to += columns * kPanel) {
      const int64_t lanes = std::min(kPanel, count - p);
      if (lanes < kPanel) std::fill_n(to, columns * kPanel, T(0));
      for (int64_t j = 0; j < lanes; j++)
        for (int64_t c = 0; c < columns; c++) to[c * kPanel + j] = x[(p + j) * row + c * column];
    }
  }

  static void copy(const T* x, int64_t row, int64_t column, int64_t count, int64_t columns, T* to, int64_t wide) {
    for (int64_t i = 0; i < count; i++, to += wide) {
      for (int64_t c = 0; c < columns; c++) to[c] = x[i * row + c * column];
      std::fill(to + columns, to + wide, T(0));
    }
  }

  // What is added to the scaled scores of query i and the keys from `begin` on; null where it is the bias alone.
  const T* added(int64_t i, int64_t begin, int64_t count, T* row) const {
    const bool has_mask = head.mask_kind != 0;
    if (!has_mask && !head.causal && head.slope == 0) return nullptr;
    const T bias = static_cast<T>(head.bias);
    const int64_t at = i * head.mask_row + begin * head.mask_column;
    if (head.mask_kind == 1) {
      const T* mask = static_cast<const T*>(head.mask) + at;
      for (int64_t j = 0; j < count; j++) row[j] = bias + mask[j * head.mask_column];
    } else if (head.mask_kind == 2) {
      const uint8_t* mask = static_cast<const uint8_t*>(head.mask) + at;
      for (int64_t j = 0; j < count; j++)
        row[j] = mask[j * head.mask_column] ? bias : -std::numeric_limits<T>::infinity();
    } else {
      std::fill_n(row, count, bias);
    }
    const int64_t diagonal = i + head.m - head.n - begin;
    if (head.slope != 0)
      for (int64_t j = 0; j < count; j++) row[j] -= static_cast<T>(head.slope) * static_cast<T>(std::abs(diagonal - j));
    if (head.causal)
      for (int64_t j = std::max<int64_t>(diagonal + 1, 0); j < count; j++) row[j] = -std::numeric_limits<T>::infinity();
    return row;
  }

  // Scores of one query -> weights 1 / (1 + e^-x), in place. The ends of both rows are padded.
  void weights(T* scores, int64_t count, const T* extra) const {
    const V scale = V::set(static_cast<T>(head.scale)), one = V::set(1), zero = V::set(0);
    const V bias = V::set(static_cast<T>(head.bias));
    for (int64_t j = 0; j < count; j += V::kWidth) {
      const V x = V::fma(V::load(scores + j), scale, extra ? V::load(extra + j) : bias);
      (one / (one + V::exp(zero - x))).store(scores + j);
    }
  }

  void forward(int64_t first, int64_t last, T* out) const {
    std::vector<T> keys(kKeys * d), values(kKeys * wide_e), sums((last - first) * wide_e, T(0));
    std::vector<T> strip(kRows * kKeys), extra(kKeys);
    for (int64_t begin = 0; begin < head.m; begin += kKeys) {
      const int64_t block = seen(begin, last);
      if (block == 0) break;
      transpose(k + begin * head.k_row, head.k_row, head.k_column, block, d, keys.data());
      copy(v + begin * head.v_row, head.v_row, 1, block, e, values.data(), wide_e);
      for (int64_t i = first; i < last; i += kRows) {
        const int64_t rows = std::min(kRows, last - i), count = std::min(block, seen(begin, i + rows));
        if (count == 0) continue;
        product<V>(rows, count, Strided<T>{q + i * head.q_row, head.q_row, 1}, keys.data(), kPanel, d * kPanel, d,
                   strip.data(), kKeys, false);
        for (int64_t r = 0; r < rows; r++)
          weights(strip.data() + r * kKeys, count, added(i + r, begin, count, extra.data()));
        product<V>(rows, wide_e, Strided<T>{strip.data(), kKeys, 1}, values.data(), wide_e, kPanel, count,
                   sums.data() + (i - first) * wide_e, wide_e, true);
      }
    }
    for (int64_t i = first; i < last; i++)
      std::copy_n(sums.data() + (i - first) * wide_e, e, out + i * e);
  }

  // dV = Pᵀ dO, dP = dO Vᵀ, dS = P (1 - P) dP, dQ = s dS K, dK = s dSᵀ Q, with P computed again.
  void backward(const T* grad, T* grad_q, T* grad_k, T* grad_v) const {
    const int64_t n = head.n, m = head.m;
    std::vector<T> queries(n * wide_d), grads(n * wide_e), sums_q(n * wide_d, T(0));
    copy(q, head.q_row, 1, n, d, queries.data(), wide_d);
    copy(grad, e, 1, n, e, grads.data(), wide_e);
    std::vector<T> keys(kKeys * d), values(kKeys * e), rows_k(kKeys * wide_d);
    std::vector<T> weight(kQueries * kKeys), change(kQueries * kKeys), extra(kKeys);
    std::vector<T> sums_k(kKeys * wide_d), sums_v(kKeys * wide_e);
    const T scale = static_cast<T>(head.scale);
    for (int64_t begin = 0; begin < m; begin += kKeys) {
      const int64_t block = std::min(kKeys, m - begin);
      transpose(k + begin * head.k_row, head.k_row, head.k_column, block, d, keys.data());
      transpose(v + begin * head.v_row, head.v_row, 1, block, e, values.data());
      copy(k + begin * head.k_row, head.k_row, head.k_column, block, d, rows_k.data(), wide_d);
      std::fill(sums_k.begin(), sums_k.end(), T(0));
      std::fill(sums_v.begin(), sums_v.end(), T(0));
      for (int64_t i = 0; i < n; i += kQueries) {
        const int64_t rows = std::min(kQueries, n - i), count = std::min(block, seen(begin, i + rows));
        if (count == 0) continue;
        const T *queries_i = queries.data() + i * wide_d, *grads_i = grads.data() + i * wide_e;
        product<V>(rows, count, Strided<T>{queries_i, wide_d, 1}, keys.data(), kPanel, d * kPanel, d, weight.data(),
                   kKeys, false);
        product<V>(rows, count, Strided<T>{grads_i, wide_e, 1}, values.data(), kPanel, e * kPanel, e, change.data(),
                   kKeys, false);
        for (int64_t r = 0; r < rows; r++) {
          T *p = weight.data() + r * kKeys, *s = change.data() + r * kKeys;
          weights(p, count, added(i + r, begin, count, extra.data()));
          for (int64_t j = 0; j < count; j += V::kWidth) {
            const V w = V::load(p + j), t = w * V::load(s + j);
            (t - w * t).store(s + j);
          }
        }
        product<V>(rows, wide_d, Strided<T>{change.data(), kKeys, 1}, rows_k.data(), wide_d, kPanel, count,
                   sums_q.data() + i * wide_d, wide_d, true);
        product<V>(count, wide_d, Strided<T>{change.data(), 1, kKeys}, queries_i, wide_d, kPanel, rows, sums_k.data(),
                   wide_d, true);
        product<V>(count, wide_e, Strided<T>{weight.data(), 1, kKeys}, grads_i, wide_e, kPanel, rows, sums_v.data(),
                   wide_e, true);
      }
      for (int64_t j = 0; j < block; j++) {
        for (int64_t c = 0; c < d; c++) grad_k[(begin + j) * d + c] = scale * sums_k[j * wide_d + c];
        std::copy_n(sums_v.data() + j * wide_e, e, grad_v + (begin + j) * e);
      }
    }
    for (int64_t i = 0; i < n; i++)
      for (int64_t c = 0; c < d; c++) grad_q[i * d + c] = scale * sums_q[i * wide_d + c];
  }
};

template <class V>
void forward_of(const SigmoidHead& head, int64_t first, int64_t last, void* out) {
  Sigmoid<V>(head).forward(first, last, static_cast<typename V::Number*>(out));
}

template <class V>
void backward_of(const SigmoidHead& head, const void* grad, void* grad_q, void* grad_k, void* grad_v) {
  using T = typename V::Number;
  Sigmoid<V>(head).backward(static_cast<const T*>(grad), static_cast<T*>(grad_q), static_cast<T*>(grad_k), static_cast<T*>(grad_v));
}

template <class V>
constexpr SigmoidKernels sigmoid_kernels() {
  return {forward_of<V>, backward_of<V>};
}

}  // namespace
}  // namespace fxquant
