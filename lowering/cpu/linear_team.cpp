// Shares the rows and tiles of one linear among the threads of a parallel region, without a barrier.
#include "layout.h"
#include "linear.h"

#include <algorithm>

using namespace fxquant;

namespace {

constexpr int64_t kChunk = 4096;        // values quantized at a time: about a microsecond
constexpr int64_t kShare = 256 * 1024;  // products worth waking a thread for: about two microseconds

// Claims up to `count` of `all` items, from the seat's own share first; their number, or 0 where nobody has any left.
int64_t claim(FxquantTeam& team, int64_t FxquantSeat::* next, int64_t seat, int64_t all, int64_t count, int64_t& first) {
  for (int64_t i = 0; i < team.threads; i++) {
    const int64_t of = (seat + i) % team.threads, begin = all * of / team.threads, end = all * (of + 1) / team.threads;
    int64_t& claimed = team.seats[of].*next;
    if (begin + __atomic_load_n(&claimed, __ATOMIC_RELAXED) >= end) continue;
    first = begin + __atomic_fetch_add(&claimed, count, __ATOMIC_RELAXED);
    if (first < end) return std::min(count, end - first);
  }
  return 0;
}

}  // namespace

extern "C" void fxquant_team_start(
    FxquantTeam* team, int64_t m, int64_t n, int64_t k, int32_t weight_bits, int32_t act_bits, int64_t threads) {
  const int64_t most = std::clamp<int64_t>(threads, 1, FXQUANT_SEATS);
  team->m = m, team->n = n, team->k = k, team->weight_bits = weight_bits, team->act_bits = act_bits;
  team->threads = std::min(most, m * k / (kShare / n + 1) + 1);
  team->chunk = std::max<int64_t>(1, kChunk / std::max<int64_t>(k, 1));
  team->rows_done = 0;
  std::fill_n(team->seats, team->threads, FxquantSeat{});
  fxquant_linear_tiles(m, n, weight_bits, act_bits, team->threads, &team->rows, &team->columns);
}

extern "C" void fxquant_team_quantize(
    FxquantTeam* team, int64_t seat, const float* x, int64_t ldx, const float* steps, const int32_t* zero_point,
    uint8_t* scratch) {
  const int64_t m = team->m, k = team->k;
  int64_t i = 0;
  while (const int64_t rows = claim(*team, &FxquantSeat::next_row, seat, m, team->chunk, i)) {
    if (steps == nullptr)
      fxquant_quantize_rows(x, ldx, i, i + rows, k, team->weight_bits, team->act_bits, scratch, m);
    else
      fxquant_quantize_rows_static(x, ldx, i, i + rows, k, team->weight_bits, team->act_bits, steps, zero_point, scratch, m);
    __atomic_fetch_add(&team->rows_done, rows, __ATOMIC_RELEASE);
  }
  // What is missing is in the hands of a thread that runs and waits for nobody.
  while (__atomic_load_n(&team->rows_done, __ATOMIC_ACQUIRE) < m) __builtin_ia32_pause();
}

extern "C" int32_t fxquant_team_tile(FxquantTeam* team, int64_t seat, FxquantTile* tile) {
  const int64_t across = (team->n + team->columns - 1) / team->columns, down = (team->m + team->rows - 1) / team->rows;
  int64_t index = 0;
  if (claim(*team, &FxquantSeat::next_tile, seat, across * down, 1, index) == 0) return 0;
  tile->m0 = index / across * team->rows, tile->m1 = std::min(tile->m0 + team->rows, team->m);
  tile->n0 = index % across * team->columns, tile->n1 = std::min(tile->n0 + team->columns, team->n);
  return 1;
}
