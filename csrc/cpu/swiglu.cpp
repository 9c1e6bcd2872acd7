// SwiGLU: silu(gate) * up over the two halves of a row, and its backward. Elements are independent.
#include "kernel.h"
#include "pair.h"
#include "sigmoid.h"

namespace neobert {
namespace {

// Both directions prefetch the next row: half a row is about a page, and the hardware's own
// prefetching starts over at every page.
template <bool kStream, class T>
void forward_row(const T* gate, const T* up, T* y, int64_t width) {
  for_pairs<2>(width, [&](int64_t i, auto pairs, auto lanes) {
    constexpr int U = 2 * pairs.value;
    Vec g[U], v[U], y_of[U];
    load_pairs(gate + i, g, lanes);
    load_pairs(up + i, v, lanes);
    prefetch_pairs<pairs.value>(gate + i + 2 * width);
    prefetch_pairs<pairs.value>(up + i + 2 * width);
    silu_times(g, v, y_of);
    store_pairs<kStream>(y + i, y_of, lanes);
  });
}

// d silu(g) / dg = s + g s (1 - s), with s = sigmoid(g).
template <bool kStream, class T>
void backward_row(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t width) {
  for_pairs<2>(width, [&](int64_t i, auto pairs, auto lanes) {
    constexpr int U = 2 * pairs.value;
    Vec g[U], e[U], d[U], v[U];
    load_pairs(gate + i, g, lanes);
    load_pairs(dy + i, d, lanes);
    load_pairs(up + i, v, lanes);
    prefetch_pairs<pairs.value>(dy + i + width);
    prefetch_pairs<pairs.value>(gate + i + 2 * width);
    prefetch_pairs<pairs.value>(up + i + 2 * width);
    exp_minus_abs(g, e);
    for (int u = 0; u < U; ++u) {
      const Vec large = set1(1.0f) / (e[u] + set1(1.0f)), small = e[u] * large;
      const Vec s = if_negative(g[u], small, large), rest = if_negative(g[u], large, small);
      const Vec silu = g[u] * s;
      v[u] = d[u] * v[u] * fmadd(silu, rest, s);
      d[u] = d[u] * silu;
    }
    store_pairs<kStream>(dup + i, d, lanes);
    store_pairs<kStream>(dgate + i, v, lanes);
  });
}

int64_t half_of_last_axis(const char* op, const Tensor& gate_up) {
  require(gate_up.dim() > 0 && gate_up.size(-1) % 2 == 0, op,
          "gate_up must have shape (..., 2 * width)");
  return gate_up.size(-1) / 2;
}

Tensor swiglu(const Tensor& gate_up_) {
  const int64_t width = half_of_last_axis("swiglu", gate_up_);
  const Tensor gate_up = as_contiguous(gate_up_);
  std::vector<int64_t> shape = sizes_of(gate_up);
  shape.back() = width;
  Tensor y = torch::stable::empty({shape.data(), shape.size()}, gate_up.scalar_type());
  const int64_t rows = width == 0 ? 0 : y.numel() / width;
  dispatch("swiglu", "gate_up", gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = data<T>(gate_up);
    T* out = data<T>(y);
    choose(worth_streaming(rows, width, out), [&](auto stream) {
      parallel(rows, 3 * width * sizeof(T), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          forward_row<stream.value>(in + 2 * row * width, in + (2 * row + 1) * width,
                                    out + row * width, width);
        _mm_sfence();
      });
    });
  });
  return y;
}

Tensor swiglu_bwd(const Tensor& dy_, const Tensor& gate_up_) {
  const int64_t width = half_of_last_axis("swiglu_bwd", gate_up_);
  std::vector<int64_t> shape = sizes_of(gate_up_);
  shape.back() = width;
  require(sizes_of(dy_) == shape && dy_.scalar_type() == gate_up_.scalar_type(), "swiglu_bwd",
          "dy must have the dtype of gate_up and half its last axis");
  const Tensor dy = as_contiguous(dy_), gate_up = as_contiguous(gate_up_);
  Tensor dgate_up = torch::stable::empty(gate_up.sizes(), gate_up.scalar_type());
  const int64_t rows = width == 0 ? 0 : dy.numel() / width;
  dispatch("swiglu_bwd", "gate_up", gate_up, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *in = data<T>(gate_up), *d = data<T>(dy);
    T* out = data<T>(dgate_up);
    choose(worth_streaming(2 * rows, width, out), [&](auto stream) {
      parallel(rows, 5 * width * sizeof(T), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t gate = 2 * row * width, up = gate + width;
          backward_row<stream.value>(d + row * width, in + gate, in + up, out + gate, out + up,
                                     width);
        }
        _mm_sfence();
      });
    });
  });
  return dgate_up;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace neobert
