// silu(g) * up, shared by swiglu and by the epilogue of linear_swiglu: with one formula the two
// give the same bits in float32.
#pragma once

#include "simd.h"

namespace neobert {

// e = e^-|g|, which does not overflow, so that nothing below is lost to a difference from 1 or to
// an infinity: sigmoid(g) is 1 / (1 + e) or e / (1 + e), by the sign of g. It is 0 from 104 on, and
// for NaN a number: NaN comes back with the factor g.
template <int U>
inline __attribute__((always_inline)) void exp_minus_abs(const Vec (&g)[U], Vec (&e)[U]) {
  for (int u = 0; u < U; ++u) e[u] = minus_abs(g[u], 104.0f);
  exp_in_range(e);
}

// The division is cheaper than an estimated reciprocal refined in two multiply-adds, since its unit
// works beside those that the polynomial of the exponential keeps busy.
template <int U>
inline __attribute__((always_inline)) void silu_times(const Vec (&g)[U], const Vec (&up)[U],
                                                      Vec (&y)[U]) {
  Vec e[U];
  exp_minus_abs(g, e);
  for (int u = 0; u < U; ++u)
    y[u] = scale_negative(g[u], e[u]) * up[u] / (e[u] + set1(1.0f));
}

}  // namespace neobert
