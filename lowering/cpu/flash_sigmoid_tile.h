// C [rows, 2 vectors] = A [rows, k] B [k, 2 vectors], with any strides of A: the product behind both halves of attention.
#pragma once
#include "rows.h"

#include <cstdint>

namespace fxquant {
namespace {

template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;
};

// Two named accumulators a row. add: onto what c holds.
#define FXQUANT_START(r) V a##r = V::set(0), b##r = a##r;
#define FXQUANT_LOAD(r) a##r = V::load(c + r * ldc), b##r = V::load(c + r * ldc + V::kWidth);
#define FXQUANT_STEP(r)                     \
  {                                         \
    const V x = V::set(p[r * a.row]);       \
    a##r = V::fma(x, w0, a##r);             \
    b##r = V::fma(x, w1, b##r);             \
  }
#define FXQUANT_STORE(r) a##r.store(c + r * ldc), b##r.store(c + r * ldc + V::kWidth);
#define FXQUANT_TILE(R)                                                                                             \
  template <class V, typename T = typename V::Number>                                                               \
  void tile_##R(Strided<T> a, const T* b, int64_t ldb, int64_t k, T* c, int64_t ldc, bool add) {                    \
    FXQUANT_ROWS_##R(FXQUANT_START) if (add) { FXQUANT_ROWS_##R(FXQUANT_LOAD) }                                     \
    const T* p = a.data;                                                                                            \
    for (int64_t i = 0; i < k; i++, p += a.column, b += ldb) {                                                      \
      const V w0 = V::load(b), w1 = V::load(b + V::kWidth);                                                         \
      FXQUANT_ROWS_##R(FXQUANT_STEP)                                                                                \
    }                                                                                                               \
    FXQUANT_ROWS_##R(FXQUANT_STORE)                                                                                 \
  }
FXQUANT_TILE(1) FXQUANT_TILE(2) FXQUANT_TILE(3) FXQUANT_TILE(4) FXQUANT_TILE(5) FXQUANT_TILE(6) FXQUANT_TILE(7)
FXQUANT_TILE(8) FXQUANT_TILE(9) FXQUANT_TILE(10) FXQUANT_TILE(11) FXQUANT_TILE(12)

// Most rows of a tile: what the registers hold.
template <class V>
constexpr int64_t tile_rows() {
  return V::kWidth == 16 ? 12 : 6;
}

template <class V, typename T = typename V::Number>
void tile(int64_t rows, Strided<T> a, const T* b, int64_t ldb, int64_t k, T* c, int64_t ldc, bool add) {
  switch (rows) {
    case 1: return tile_1<V>(a, b, ldb, k, c, ldc, add);
    case 2: return tile_2<V>(a, b, ldb, k, c, ldc, add);
    case 3: return tile_3<V>(a, b, ldb, k, c, ldc, add);
    case 4: return tile_4<V>(a, b, ldb, k, c, ldc, add);
    case 5: return tile_5<V>(a, b, ldb, k, c, ldc, add);
    case 6: return tile_6<V>(a, b, ldb, k, c, ldc, add);
  }
  if constexpr (tile_rows<V>() > 6) switch (rows) {
      case 7: return tile_7<V>(a, b, ldb, k, c, ldc, add);
      case 8: return tile_8<V>(a, b, ldb, k, c, ldc, add);
      case 9: return tile_9<V>(a, b, ldb, k, c, ldc, add);
      case 10: return tile_10<V>(a, b, ldb, k, c, ldc, add);
      case 11: return tile_11<V>(a, b, ldb, k, c, ldc, add);
      case 12: return tile_12<V>(a, b, ldb, k, c, ldc, add);
    }
}

// C [rows, columns] from B in panels of two vectors, `panel` elements apart; columns are padded to whole panels.
template <class V, typename T = typename V::Number>
void product(
    int64_t rows, int64_t columns, Strided<T> a, const T* b, int64_t ldb, int64_t panel, int64_t k, T* c, int64_t ldc,
    bool add) {
  constexpr int64_t kPanel = 2 * V::kWidth, kRows = tile_rows<V>();
  for (int64_t j = 0; j < columns; j += kPanel)
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t count = rows - i < kRows ? rows - i : kRows;
      tile<V>(count, {a.data + i * a.row, a.row, a.column}, b + j / kPanel * panel, ldb, k, c + i * ldc + j, ldc, add);
    }
}

}  // namespace
}  // namespace fxquant
