// RMSNorm, alone and after a residual add, forward and backward. Rows are independent in the
// forward pass and in dx, so their bits depend neither on the batch nor on the thread count.
#include "kernel.h"

namespace neobert {
namespace {

// Reads x (+ residual), writes the sum if there is one, returns the sum of squares. The statistics
// are those of the rounded sum: what a later reader of it would compute.
template <class X, class R>
float sum_of_squares(const X* x, const R* residual, R* total, int64_t dim) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  auto step = [&](int64_t at, Vec& a) {
    Vec v = load(x + at);
    if (residual != nullptr) {
      v = rounded_to(static_cast<R*>(nullptr), v + load(residual + at));
      store(total + at, v);
    }
    a = fmadd(v, v, a);
  };
  for (; i + 4 * kWidth <= dim; i += 4 * kWidth)
    for (int u = 0; u < 4; ++u) step(i + u * kWidth, acc[u]);
  for (; i + kWidth <= dim; i += kWidth) step(i, acc[0]);
  if (const int n = static_cast<int>(dim - i); n > 0) {
    Vec v = load(x + i, n);
    if (residual != nullptr) {
      v = rounded_to(static_cast<R*>(nullptr), v + load(residual + i, n));
      store(total + i, v, n);
    }
    acc[0] = fmadd(v, v, acc[0]);
  }
  return hsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class S, class Y>
void scale_row(const S* source, const float* weight, float rstd, Y* y, int64_t dim) {
  const Vec r = set1(rstd);
  int64_t i = 0;
  for (; i + kWidth <= dim; i += kWidth) store(y + i, load(source + i) * r * load(weight + i));
  if (const int n = static_cast<int>(dim - i); n > 0)
    store(y + i, load(source + i, n) * r * load(weight + i, n), n);
}

template <class X, class R>
void forward(const X* x, const R* residual, const float* weight, float eps, X* y, R* total,
             float* rstd, int64_t rows, int64_t dim) {
  torch::stable::parallel_for(0, rows, row_grain(3 * dim * sizeof(X)), [&](int64_t b, int64_t e) {
    for (int64_t row = b; row < e; ++row) {
      const int64_t at = row * dim;
      const R* r = residual == nullptr ? nullptr : residual + at;
      R* t = residual == nullptr ? nullptr : total + at;
      const float squares = sum_of_squares(x + at, r, t, dim);
      rstd[row] = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
      if (residual == nullptr) {
        scale_row(x + at, weight, rstd[row], y + at, dim);
      } else {
        scale_row(t, weight, rstd[row], y + at, dim);
      }
    }
  });
}

// One row of dx, and its term of dweight added to `dweight`.
template <class X, class Y>
void backward_row(const Y* dy, const X* dtotal, const X* x, const float* weight, float rstd, X* dx,
                  float* dweight, int64_t dim) {
  Vec acc[2] = {zero(), zero()};
  int64_t i = 0;
  const Vec r = set1(rstd);
  auto step = [&](int64_t at, Vec& a) {
    const Vec x_hat = load(x + at) * r, g = load(dy + at);
    a = fmadd(g * load(weight + at), x_hat, a);
    store(dweight + at, fmadd(g, x_hat, load(dweight + at)));
  };
  for (; i + 2 * kWidth <= dim; i += 2 * kWidth) {
    step(i, acc[0]);
    step(i + kWidth, acc[1]);
  }
  for (; i + kWidth <= dim; i += kWidth) step(i, acc[0]);
  if (const int n = static_cast<int>(dim - i); n > 0) {
    const Vec x_hat = load(x + i, n) * r, g = load(dy + i, n);
    acc[0] = fmadd(g * load(weight + i, n), x_hat, acc[0]);
    store(dweight + i, fmadd(g, x_hat, load(dweight + i, n)), n);
  }
  const Vec mean = set1(hsum(acc[0] + acc[1]) / static_cast<float>(dim));
  for (i = 0; i < dim; i += kWidth) {
    const int n = static_cast<int>(std::min<int64_t>(kWidth, dim - i));
    const bool whole = n == kWidth;
    auto at = [&](auto* p) { return whole ? load(p + i) : load(p + i, n); };
    Vec d = fnmadd(at(x) * r, mean, at(dy) * at(weight)) * r;
    if (dtotal != nullptr) d = d + at(dtotal);
    whole ? store(dx + i, d) : store(dx + i, d, n);
  }
}

template <class X, class Y>
void backward(const Y* dy, const X* dtotal, const X* x, const float* weight, const float* rstd,
              X* dx, float* dweight, int64_t rows, int64_t dim) {
  // dweight is summed over fixed blocks of rows, then over blocks in order: the same bits for any
  // number of threads.
  const int64_t blocks = std::clamp<int64_t>(rows / 32, 1, 64);
  const int64_t per_block = (rows + blocks - 1) / blocks;
  std::vector<float> partial(blocks * dim, 0.0f);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b, int64_t e) {
    for (int64_t block = b; block < e; ++block)
      for (int64_t row = block * per_block; row < std::min(rows, (block + 1) * per_block); ++row) {
        const int64_t at = row * dim;
        backward_row(dy + at, dtotal == nullptr ? nullptr : dtotal + at, x + at, weight, rstd[row],
                     dx + at, partial.data() + block * dim, dim);
      }
  });
  std::fill_n(dweight, dim, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < dim; ++i) dweight[i] += partial[block * dim + i];
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), op,
          "weight must have one element per column of x");
}

Tensor empty_rstd(const Tensor& x) {
  return torch::stable::empty({x.sizes().data(), static_cast<size_t>(x.dim() - 1)},
                              ScalarType::Float);
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& weight_, double eps) {
  check("rms_norm", x_, weight_);
  const Tensor x = as_contiguous(x_), weight = as_float(weight_);
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type()), rstd = empty_rstd(x);
  dispatch("rms_norm", "x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward<T, T>(data<T>(x), nullptr, data<float>(weight), static_cast<float>(eps), data<T>(y),
                  nullptr, data<float>(rstd), rstd.numel(), weight.size(0));
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual_,
                                                const Tensor& weight_, double eps) {
  check("add_rms_norm", x_, weight_);
  require(x_.sizes().vec() == residual_.sizes().vec(), "add_rms_norm",
          "x and residual must have one shape");
  const Tensor x = as_contiguous(x_), residual = as_contiguous(residual_), weight = as_float(weight_);
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type());
  Tensor total = torch::stable::empty(x.sizes(), residual.scalar_type()), rstd = empty_rstd(x);
  dispatch("add_rms_norm", "x", x, [&](auto* x_type) {
    dispatch("add_rms_norm", "residual", residual, [&](auto* residual_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using R = std::remove_pointer_t<decltype(residual_type)>;
      forward<X, R>(data<X>(x), data<R>(residual), data<float>(weight), static_cast<float>(eps),
                    data<X>(y), data<R>(total), data<float>(rstd), rstd.numel(), weight.size(0));
    });
  });
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_, const std::optional<Tensor>& dtotal_,
                                        const Tensor& x_, const Tensor& weight_,
                                        const Tensor& rstd_) {
  check("rms_norm_bwd", x_, weight_);
  require(dy_.sizes().vec() == x_.sizes().vec(), "rms_norm_bwd", "dy and x must have one shape");
  const Tensor dy = as_contiguous(dy_), x = as_contiguous(x_), weight = as_float(weight_);
  const Tensor rstd = as_contiguous(rstd_);
  std::optional<Tensor> dtotal;
  if (dtotal_.has_value()) {
    require(dtotal_->sizes().vec() == x_.sizes().vec() &&
                dtotal_->scalar_type() == x_.scalar_type(),
            "rms_norm_bwd", "dtotal and x must have one shape and dtype");
    dtotal = as_contiguous(*dtotal_);
  }
  Tensor dx = torch::stable::empty(x.sizes(), x.scalar_type());
  Tensor dweight = empty_cpu({weight.size(0)}, ScalarType::Float);
  dispatch("rms_norm_bwd", "x", x, [&](auto* x_type) {
    dispatch("rms_norm_bwd", "dy", dy, [&](auto* y_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Y = std::remove_pointer_t<decltype(y_type)>;
      backward<X, Y>(data<Y>(dy), dtotal ? data<X>(*dtotal) : nullptr, data<X>(x),
                     data<float>(weight), data<float>(rstd), data<X>(dx), data<float>(dweight),
                     rstd.numel(), weight.size(0));
    });
  });
  return {dx, torch::stable::to(dweight, weight_.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace neobert
