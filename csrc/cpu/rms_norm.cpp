// RMSNorm, alone and after a residual add, forward and backward. Rows are independent in the
// forward pass and in dx, so their bits depend neither on the batch nor on the thread count.
#include "kernel.h"

namespace neobert {
namespace {

// The row is read twice, the second time from the first-level cache.
template <bool kStream, class S, class Y>
void scale_row(const S* row, const float* weight, float rstd, Y* y, int64_t dim) {
  const Vec r = set1(rstd);
  for_vectors<4>(dim, [&](int64_t i, int, auto lanes) {
    store<kStream>(y + i, load(row + i, lanes) * r * load(weight + i, lanes), lanes);
  });
}

float rstd_of(const Vec (&squares)[4], int64_t dim, float eps) {
  const float sum = hsum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  return 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
}

template <class T>
void norm(const T* x, const float* weight, float eps, T* y, float* rstd, int64_t rows,
          int64_t dim) {
  choose(worth_streaming(rows, dim, y), [&](auto stream) {
    parallel(rows, 2 * dim * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* input = x + row * dim;
        Vec squares[4] = {zero(), zero(), zero(), zero()};
        for_vectors<4>(dim, [&](int64_t i, int u, auto lanes) {
          const Vec v = load(input + i, lanes);
          squares[u] = fmadd(v, v, squares[u]);
        });
        rstd[row] = rstd_of(squares, dim, eps);
        scale_row<stream.value>(input, weight, rstd[row], y + row * dim, dim);
      }
      _mm_sfence();
    });
  });
}

// The norm is that of the rounded sum: what a later reader of the sum would compute. A sum that
// goes past the caches is kept in `kept` until its row is done.
template <class X, class R>
void add_norm(const X* x, const R* residual, const float* weight, float eps, X* y, R* total,
              float* rstd, int64_t rows, int64_t dim) {
  choose(worth_streaming(rows, dim, y, total), [&](auto stream) {
    parallel(rows, 2 * dim * (sizeof(X) + sizeof(R)), [&](int64_t begin, int64_t end) {
      std::vector<R> kept(stream.value ? dim : 0);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * dim;
        R* sum = stream.value ? kept.data() : total + at;
        Vec squares[4] = {zero(), zero(), zero(), zero()};
        for_vectors<4>(dim, [&](int64_t i, int u, auto lanes) {
          const Vec added = load(residual + at + i, lanes) + load(x + at + i, lanes);
          const Vec v = store_rounded(sum + i, added, lanes);
          squares[u] = fmadd(v, v, squares[u]);
        });
        rstd[row] = rstd_of(squares, dim, eps);
        if constexpr (stream.value) stream_copy(total + at, sum, dim * sizeof(R));
        scale_row<stream.value>(sum, weight, rstd[row], y + at, dim);
      }
      _mm_sfence();
    });
  });
}

// With x_hat = x * rstd and g = dy * weight: dx = rstd * (g - x_hat * mean(g * x_hat)) + dtotal.
// The row's term of dweight is added to `dweight`; dx goes out in one or in two dtypes.
template <bool kStream, class X, class Y>
void backward_row(const Y* dy, const X* dtotal, const X* x, const float* weight, float rstd, X* dx,
                  Y* dbranch, float* dweight, int64_t dim) {
  const Vec r = set1(rstd);
  Vec products[4] = {zero(), zero(), zero(), zero()};
  for_vectors<4>(dim, [&](int64_t i, int u, auto lanes) {
    const Vec x_hat = load(x + i, lanes) * r, g = load(dy + i, lanes);
    products[u] = fmadd(g * load(weight + i, lanes), x_hat, products[u]);
    store(dweight + i, fmadd(g, x_hat, load(dweight + i, lanes)), lanes);
  });
  const float sum = hsum((products[0] + products[1]) + (products[2] + products[3]));
  const Vec mean = set1(sum / static_cast<float>(dim));
  for_vectors<4>(dim, [&](int64_t i, int, auto lanes) {
    const Vec g = load(dy + i, lanes) * load(weight + i, lanes);
    Vec d = fnmadd(load(x + i, lanes) * r, mean, g) * r;
    if (dtotal != nullptr) d = d + load(dtotal + i, lanes);
    store<kStream>(dx + i, d, lanes);
    if (dbranch != nullptr) store<kStream>(dbranch + i, d, lanes);
  });
}

template <class X, class Y>
void backward(const Y* dy, const X* dtotal, const X* x, const float* weight, const float* rstd,
              X* dx, Y* dbranch, float* dweight, int64_t rows, int64_t dim) {
  // dweight is summed over runs of 16 rows, those over fixed blocks of rows, and those in order:
  // the same bits for any number of threads, and rounding errors that hardly grow with the rows.
  constexpr int64_t kRun = 16;
  const int64_t blocks = std::clamp<int64_t>(rows / 64, 1, 64);
  const int64_t per_block = (rows + blocks - 1) / blocks;
  const int64_t row_bytes = dim * (sizeof(Y) + 2 * sizeof(X) + (dtotal ? sizeof(X) : 0));
  std::vector<float> partial(blocks * dim, 0.0f);
  const bool streams =
      dbranch ? worth_streaming(rows, dim, dx, dbranch) : worth_streaming(rows, dim, dx);
  choose(streams, [&](auto stream) {
    parallel(blocks, per_block * row_bytes, [&](int64_t begin, int64_t end) {
      std::vector<float> run(dim, 0.0f);
      for (int64_t block = begin; block < end; ++block) {
        float* sum = partial.data() + block * dim;
        const int64_t first = block * per_block, last = std::min(rows, first + per_block);
        for (int64_t row = first; row < last; ++row) {
          const int64_t at = row * dim;
          backward_row<stream.value>(dy + at, dtotal ? dtotal + at : nullptr, x + at, weight,
                                     rstd[row], dx + at, dbranch ? dbranch + at : nullptr,
                                     run.data(), dim);
          if ((row - first) % kRun != kRun - 1 && row + 1 != last) continue;
          for_vectors(dim, [&](int64_t i, int, auto lanes) {
            store(sum + i, load(sum + i, lanes) + load(run.data() + i, lanes), lanes);
            store(run.data() + i, zero(), lanes);
          });
        }
      }
      _mm_sfence();
    });
  });
  std::fill_n(dweight, dim, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < dim; ++i) dweight[i] += partial[block * dim + i];
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(-1), op,
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
    norm(data<T>(x), data<float>(weight), static_cast<float>(eps), data<T>(y), data<float>(rstd),
         rstd.numel(), weight.size(0));
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_, const Tensor& residual_,
                                                const Tensor& weight_, double eps) {
  check("add_rms_norm", x_, weight_);
  require(same_shape(x_, residual_), "add_rms_norm", "x and residual must have one shape");
  const Tensor x = as_contiguous(x_), residual = as_contiguous(residual_);
  const Tensor weight = as_float(weight_);
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type());
  Tensor total = torch::stable::empty(x.sizes(), residual.scalar_type()), rstd = empty_rstd(x);
  dispatch("add_rms_norm", "x", x, [&](auto* x_type) {
    dispatch("add_rms_norm", "residual", residual, [&](auto* residual_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using R = std::remove_pointer_t<decltype(residual_type)>;
      add_norm(data<X>(x), data<R>(residual), data<float>(weight), static_cast<float>(eps),
               data<X>(y), data<R>(total), data<float>(rstd), rstd.numel(), weight.size(0));
    });
  });
  return {y, total, rstd};
}

// dx, dweight, and where asked for dx a second time, in dy's dtype.
void backward_into(const char* op, const Tensor& dy_, const std::optional<Tensor>& dtotal_,
                   const Tensor& x_, const Tensor& weight_, const Tensor& rstd_, Tensor& dx,
                   Tensor* dbranch, Tensor& dweight) {
  check(op, x_, weight_);
  require(same_shape(dy_, x_), op, "dy and x must have one shape");
  require(rstd_.scalar_type() == ScalarType::Float && rstd_.numel() * weight_.size(0) == x_.numel(),
          op, "rstd must be float32, one element per row of x");
  const Tensor dy = as_contiguous(dy_), x = as_contiguous(x_), weight = as_float(weight_);
  const Tensor rstd = as_contiguous(rstd_);
  std::optional<Tensor> dtotal;
  if (dtotal_.has_value()) {
    require(same_shape(*dtotal_, x_) && dtotal_->scalar_type() == x_.scalar_type(), op,
            "dtotal and x must have one shape and dtype");
    dtotal = as_contiguous(*dtotal_);
  }
  dx = torch::stable::empty(x.sizes(), x.scalar_type());
  if (dbranch != nullptr) *dbranch = torch::stable::empty(x.sizes(), dy.scalar_type());
  Tensor sum = empty_cpu({weight.size(0)}, ScalarType::Float);
  dispatch(op, "x", x, [&](auto* x_type) {
    dispatch(op, "dy", dy, [&](auto* y_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Y = std::remove_pointer_t<decltype(y_type)>;
      backward<X, Y>(data<Y>(dy), dtotal ? data<X>(*dtotal) : nullptr, data<X>(x),
                     data<float>(weight), data<float>(rstd), data<X>(dx),
                     dbranch ? data<Y>(*dbranch) : nullptr, data<float>(sum), rstd.numel(),
                     weight.size(0));
    });
  });
  dweight = as_dtype(sum, weight_.scalar_type());
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dtotal,
                                        const Tensor& x, const Tensor& weight,
                                        const Tensor& rstd) {
  Tensor dx, dweight;
  backward_into("rms_norm_bwd", dy, dtotal, x, weight, rstd, dx, nullptr, dweight);
  return {dx, dweight};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd(const Tensor& dy,
                                                    const std::optional<Tensor>& dtotal,
                                                    const Tensor& total, const Tensor& weight,
                                                    const Tensor& rstd) {
  Tensor dx, dresidual, dweight;
  backward_into("add_rms_norm_bwd", dy, dtotal, total, weight, rstd, dresidual, &dx, dweight);
  return {dx, dresidual, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd));
}

}  // namespace neobert
