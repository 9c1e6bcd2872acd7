// The logistic function, shared by swiglu and by the epilogue of linear_swiglu: with one formula the
// two give the same bits in float32.
#pragma once

#include "simd.h"

namespace neobert {

// sigmoid(x) and sigmoid(-x), each to about 2 ulp over the whole range: formed from e^-|x|, which
// does not overflow, so that neither is lost to a difference from 1 or to an infinity.
template <int U>
inline __attribute__((always_inline)) void sigmoid(const Vec (&x)[U], Vec (&of)[U],
                                                   Vec (&of_negated)[U]) {
  for (int u = 0; u < U; ++u) of[u] = with_minus_sign(x[u]);
  exp(of);
  for (int u = 0; u < U; ++u) {
    const Vec large = reciprocal(of[u] + set1(1.0f)), small = of[u] * large;
    of[u] = if_negative(x[u], small, large);
    of_negated[u] = if_negative(x[u], large, small);
  }
}

}  // namespace neobert
