// RMSNorm, alone and after a residual add, forward and backward. Rows are independent in the
// forward pass and in dx, so their bits depend neither on the batch nor on the thread count.
#include "kernel.h"
#include "pair.h"

namespace neobert {
namespace {

// Calls f(row, N) for groups of N rows, an integral_constant: four, and one for the rows left over.
// From a row's sum to its factor is a chain of dependent instructions half as long as all other work
// on the row; the chains of a group overlap. Rows that are streamed come one at a time: memory is
// what they wait for, and it likes reads and writes in turn. A row is summed in one order either way.
constexpr int kGroup = 4;
template <bool kStream, class F>
void for_row_groups(int64_t begin, int64_t end, F&& f) {
  int64_t row = begin;
  if constexpr (!kStream)
    for (; row + kGroup <= end; row += kGroup) f(row, std::integral_constant<int, kGroup>{});
  for (; row < end; ++row) f(row, std::integral_constant<int, 1>{});
}

// A row of floats in the order of the kernel's pairs, padded to whole ones and aligned to them.
template <bool kSplit>
class PairedRow {
 public:
  explicit PairedRow(int64_t dim) : dim_(dim), pairs_((dim + kPair - 1) / kPair) {}
  PairedRow(const float* from, int64_t dim) : PairedRow(dim) {
    for (int64_t i = 0; i < dim; ++i) data()[place<kSplit>(i)] = from[i];
  }
  float* data() { return reinterpret_cast<float*>(pairs_.data()); }
  const float* data() const { return reinterpret_cast<const float*>(pairs_.data()); }
  // Adds the other row and leaves it zero.
  void take(PairedRow& other) {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      pairs_[i] = pairs_[i] + other.pairs_[i];
      other.pairs_[i] = {zero(), zero()};
    }
  }
  void copy_to(float* to) const {
    for (int64_t i = 0; i < dim_; ++i) to[i] = data()[place<kSplit>(i)];
  }

 private:
  int64_t dim_;
  std::vector<Pair> pairs_;
};

// The sums of squares of two pairs, kept apart so that they do not wait for one another.
struct Squares {
  Pair sums[2] = {};
  void add(int u, Pair v) { sums[u] = fmadd(v, v, sums[u]); }
  float rstd(int64_t dim, float eps) const {
    return 1.0f / std::sqrt(hsum(sums[0] + sums[1]) / static_cast<float>(dim) + eps);
  }
};

// The row comes from the first-level cache: this is the second time that it is read.
template <bool kSplit, bool kStream, class S, class Y>
void scale_row(const S* row, const float* weight, float rstd, Y* y, int64_t dim) {
  const Vec r = set1(rstd);
  for_pairs<2>(dim, [&](int64_t i, auto pairs, auto lanes) {
    for (int64_t at = i; at < i + pairs.value * kPair; at += kPair)
      store_pair<kSplit, kStream>(
          y + at, load_pair<kSplit>(row + at, lanes) * r * load_pair<kSplit>(weight + at), lanes);
  });
}

template <int N, bool kStream, class T>
void norm_rows(const T* x, const float* weight, float eps, T* y, float* rstd, int64_t dim) {
  constexpr bool kSplit = kSplits<T>;
  for (int k = 0; k < N; ++k) {
    Squares squares;
    for_pairs<2>(dim, [&](int64_t i, auto pairs, auto lanes) {
      for (int u = 0; u < pairs.value; ++u)
        squares.add(u, load_pair<kSplit>(x + k * dim + i + u * kPair, lanes));
    });
    rstd[k] = squares.rstd(dim, eps);
  }
  for (int k = 0; k < N; ++k)
    scale_row<kSplit, kStream>(x + k * dim, weight, rstd[k], y + k * dim, dim);
}

template <class T>
void norm(const T* x, const float* weight_, float eps, T* y, float* rstd, int64_t rows,
          int64_t dim) {
  const PairedRow<kSplits<T>> weight(weight_, dim);
  choose(worth_streaming(rows, dim, y), [&](auto stream) {
    parallel(rows, 2 * dim * sizeof(T), [&](int64_t begin, int64_t end) {
      for_row_groups<stream.value>(begin, end, [&](int64_t row, auto group) {
        norm_rows<group.value, stream.value>(x + row * dim, weight.data(), eps, y + row * dim,
                                             rstd + row, dim);
      });
      _mm_sfence();
    });
  });
}

// The norm is that of the rounded sum: what a later reader of the sum would compute. Sums that go
// past the caches are kept in `kept` until their rows are done.
template <int N, bool kStream, class X, class R>
void add_norm_rows(const X* x, const R* residual, const float* weight, float eps, X* y, R* total,
                   float* rstd, R* kept, int64_t dim) {
  constexpr bool kSplit = kSplits<X, R>;
  R* const sum = kStream ? kept : total;
  for (int k = 0; k < N; ++k) {
    Squares squares;
    for_pairs<2>(dim, [&](int64_t i, auto pairs, auto lanes) {
      for (int u = 0; u < pairs.value; ++u) {
        const int64_t at = k * dim + i + u * kPair;
        const Pair added =
            load_pair<kSplit>(residual + at, lanes) + load_pair<kSplit>(x + at, lanes);
        squares.add(u, store_pair<kSplit>(sum + at, added, lanes));
      }
    });
    rstd[k] = squares.rstd(dim, eps);
  }
  if constexpr (kStream) stream_copy(total, sum, dim * sizeof(R));
  for (int k = 0; k < N; ++k)
    scale_row<kSplit, kStream>(sum + k * dim, weight, rstd[k], y + k * dim, dim);
}

template <class X, class R>
void add_norm(const X* x, const R* residual, const float* weight_, float eps, X* y, R* total,
              float* rstd, int64_t rows, int64_t dim) {
  const PairedRow<kSplits<X, R>> weight(weight_, dim);
  choose(worth_streaming(rows, dim, y, total), [&](auto stream) {
    parallel(rows, 2 * dim * (sizeof(X) + sizeof(R)), [&](int64_t begin, int64_t end) {
      std::vector<R> kept(stream.value ? dim : 0);
      for_row_groups<stream.value>(begin, end, [&](int64_t row, auto group) {
        const int64_t at = row * dim;
        add_norm_rows<group.value, stream.value>(x + at, residual + at, weight.data(), eps, y + at,
                                                 total + at, rstd + row, kept.data(), dim);
      });
      _mm_sfence();
    });
  });
}

// With x_hat = x * rstd and g = dy * weight: dx = rstd * (g - x_hat * mean(g * x_hat)) + dtotal.
// The row's term of dweight is added to `dweight`; dx goes out in one or in two dtypes.
template <bool kStream, class X, class Y>
void backward_row(const Y* dy, const X* dtotal, const X* x, const float* weight, float rstd, X* dx,
                  Y* dbranch, float* dweight, int64_t dim) {
  constexpr bool kSplit = kSplits<X, Y>;
  const Vec r = set1(rstd);
  Pair products[2] = {};
  for_pairs<2>(dim, [&](int64_t i, auto pairs, auto lanes) {
    for (int u = 0; u < pairs.value; ++u) {
      const int64_t at = i + u * kPair;
      const Pair x_hat = load_pair<kSplit>(x + at, lanes) * r, g = load_pair<kSplit>(dy + at, lanes);
      products[u] = fmadd(g * load_pair<kSplit>(weight + at), x_hat, products[u]);
      store_pair<kSplit>(dweight + at, fmadd(g, x_hat, load_pair<kSplit>(dweight + at)));
    }
  });
  const Vec mean = set1(hsum(products[0] + products[1]) / static_cast<float>(dim));
  for_pairs<2>(dim, [&](int64_t i, auto pairs, auto lanes) {
    for (int64_t at = i; at < i + pairs.value * kPair; at += kPair) {
      const Pair g = load_pair<kSplit>(dy + at, lanes) * load_pair<kSplit>(weight + at);
      Pair d = fnmadd(load_pair<kSplit>(x + at, lanes) * r, mean, g) * r;
      if (dtotal != nullptr) d = d + load_pair<kSplit>(dtotal + at, lanes);
      store_pair<kSplit, kStream>(dx + at, d, lanes);
      if (dbranch != nullptr) store_pair<kSplit, kStream>(dbranch + at, d, lanes);
    }
  });
}

template <class X, class Y>
void backward(const Y* dy, const X* dtotal, const X* x, const float* weight_, const float* rstd,
              X* dx, Y* dbranch, float* dweight, int64_t rows, int64_t dim) {
  // dweight is summed over runs of 16 rows, those over fixed blocks of rows, and those in order:
  // the same bits for any number of threads, and rounding errors that hardly grow with the rows.
  constexpr int64_t kRun = 16;
  using Row = PairedRow<kSplits<X, Y>>;
  const Row weight(weight_, dim);
  const int64_t blocks = std::clamp<int64_t>(rows / 64, 1, 64);
  const int64_t per_block = (rows + blocks - 1) / blocks;
  const int64_t row_bytes = dim * (sizeof(Y) + 2 * sizeof(X) + (dtotal ? sizeof(X) : 0));
  std::vector<Row> partial(blocks, Row(dim));
  const bool streams =
      dbranch ? worth_streaming(rows, dim, dx, dbranch) : worth_streaming(rows, dim, dx);
  choose(streams, [&](auto stream) {
    parallel(blocks, per_block * row_bytes, [&](int64_t begin, int64_t end) {
      Row run(dim);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * per_block, last = std::min(rows, first + per_block);
        for (int64_t row = first; row < last; ++row) {
          const int64_t at = row * dim;
          backward_row<stream.value>(dy + at, dtotal ? dtotal + at : nullptr, x + at,
                                     weight.data(), rstd[row], dx + at,
                                     dbranch ? dbranch + at : nullptr, run.data(), dim);
          if ((row - first) % kRun == kRun - 1 || row + 1 == last) partial[block].take(run);
        }
      }
      _mm_sfence();
    });
  });
  Row total(dim);
  for (Row& block : partial) total.take(block);
  total.copy_to(dweight);
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
