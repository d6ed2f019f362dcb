// Loops whose index is a constant: arrays that only constants index stay in registers.
#pragma once
#include <utility>

namespace fxquant {

template <int Count>
using Range = std::make_integer_sequence<int, Count>;

// f(0), f(1) ... in order.
template <int... I, typename F>
inline __attribute__((always_inline)) void each(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

}  // namespace fxquant
