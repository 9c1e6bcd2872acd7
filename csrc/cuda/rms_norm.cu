// RMSNorm, alone and after a residual add, forward and backward: a warp per row. A row's bits in y,
// rstd and dx depend on nothing but that row; dweight is summed in an order that only the number of
// rows and the GPU's number of multiprocessors decide.
#include <algorithm>

#include "array.cuh"

namespace neobert {
namespace {

constexpr int kRowsPerBlock = 4;
// Of the backward kernel for narrow rows: its grid is one wave of resident blocks.
constexpr int kBlocksPerSM = 3;

struct None {};  // the type of a residual that is not there

// Elements per access: the widest type moves in 16 bytes, and every lane's accesses lie beside its
// neighbours'.
template <class A, class B>
constexpr int kAccessWidth = 16 / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

// dim <= 32 * E, a multiple of the access width: the row stays in E registers of each lane. W is a
// pointer or Any.
template <int E, class X, class R, class W>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    rms_norm_in_registers(const X* x, const R* residual, W weight, float eps, X* y,
                          R* total, float* rstd, int64_t rows, int dim, float inverse_dim) {
  constexpr int N = kAccessWidth<X, R>, K = E / N;
  constexpr bool kAdd = !std::is_same_v<R, None>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;  // the whole warp
  const int64_t at = row * dim;
  // Everything is asked for before anything is waited for.
  Fetched<X, N> x_row[K];
  Fetched<R, N> residual_row[K];
  decltype(fetch<Use::kConstant, N>(weight)) weight_row[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = (k * kWarp + threadIdx.x) * N;
    if (column >= dim) continue;
    // Without a residual x is the stream itself, which the next add reads again.
    x_row[k] = fetch<kAdd ? Use::kOnce : Use::kAgain, N>(x + at + column);
    if constexpr (kAdd) residual_row[k] = fetch<Use::kOnce, N>(residual + at + column);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = (k * kWarp + threadIdx.x) * N;
    if (column < dim) weight_row[k] = fetch<Use::kConstant, N>(weight + column);
  }
  float v[K][N], squares = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = (k * kWarp + threadIdx.x) * N;
    if (column >= dim) continue;
    unpack(x_row[k], v[k]);
    if constexpr (kAdd) {
      float r[N];
      unpack(residual_row[k], r);
#pragma unroll
      for (int i = 0; i < N; ++i) v[k][i] = rounded(total, v[k][i] + r[i]);
      store(total + at + column, v[k]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares += v[k][i] * v[k][i];
  }
  const float scale = rsqrtf(warp_sum(squares) * inverse_dim + eps);
  if (threadIdx.x == 0) store(rstd + row, {scale});
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = (k * kWarp + threadIdx.x) * N;
    if (column >= dim) continue;
    float w[N];
    unpack(weight_row[k], w);
#pragma unroll
    for (int i = 0; i < N; ++i) v[k][i] *= scale * w[i];
    store(y + at + column, v[k]);
  }
}

// Any dim that is a multiple of N, in two passes over memory; the second mostly reads the cache. X,
// R and W are pointers or Any; R is None* where there is no residual.
template <int N, class X, class R, class W>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    rms_norm_in_passes(X x, R residual, W weight, float eps, X y, R total, float* rstd,
                       int64_t rows, int64_t dim, float inverse_dim) {
  constexpr bool kAdd = !std::is_same_v<R, None*>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  const int64_t at = row * dim;
  float v[N], squares = 0.0f;
  for (int64_t column = threadIdx.x * N; column < dim; column += kWarp * N) {
    load<Use::kAgain>(x + (at + column), v);
    if constexpr (kAdd) {
      float r[N];
      load<Use::kOnce>(residual + (at + column), r);
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = rounded(total, v[i] + r[i]);
      store(total + (at + column), v);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares += v[i] * v[i];
  }
  const float scale = rsqrtf(warp_sum(squares) * inverse_dim + eps);
  if (threadIdx.x == 0) store(rstd + row, {scale});
  for (int64_t column = threadIdx.x * N; column < dim; column += kWarp * N) {
    // Each lane reads back only what it wrote itself.
    if constexpr (kAdd) load<Use::kAgain>(total + (at + column), v);
    else load<Use::kAgain>(x + (at + column), v);
    float w[N];
    load<Use::kConstant>(weight + column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= scale * w[i];
    store(y + (at + column), v);
  }
}

// dx = rstd * (g - x_hat * mean(g * x_hat)) [+ dtotal], with x_hat = x * rstd and g = dy * weight.
// dtotal may be null; so may dbranch, which is dx rounded to the dtype of dy. A block takes every
// gridDim-th group of rows and leaves its sum of dy * x_hat in one row of partial (blocks, dim).
template <int E, class X, class Y, class W>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock, E > 32 ? 1 : kBlocksPerSM)
    rms_norm_bwd_in_registers(const Y* dy, const X* dtotal, const X* x, W weight,
                              const float* rstd, X* dx, Y* dbranch, float* partial, int64_t rows,
                              int dim, float inverse_dim) {
  constexpr int N = kAccessWidth<X, Y>, K = E / N;
  // Wide rows fill the registers: dweight is then summed in shared memory, where each lane has
  // slots of its own, one apart from its neighbours', and dtotal is read late.
  constexpr bool kWide = E > 32, kEarly = E * sizeof(X) <= 64;
  __shared__ float sums[kRowsPerBlock][E * kWarp];
  float* own_sums = sums[threadIdx.y] + threadIdx.x;
  float dweight[kWide ? 1 : E] = {};
  if constexpr (kWide) {
#pragma unroll
    for (int i = 0; i < E; ++i) own_sums[i * kWarp] = 0.0f;
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y; row < rows;
       row += stride) {
    const int64_t at = row * dim;
    const float scale = __ldg(rstd + row);
    Fetched<X, N> x_row[K], dtotal_row[K];
    Fetched<Y, N> dy_row[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = (k * kWarp + threadIdx.x) * N;
      if (column >= dim) continue;
      x_row[k] = fetch<Use::kOnce, N>(x + at + column);
      dy_row[k] = fetch<Use::kOnce, N>(dy + at + column);
      if (kEarly && dtotal != nullptr)
        dtotal_row[k] = fetch<Use::kOnce, N>(dtotal + at + column);
    }
    float x_hat[K][N], g[K][N], dot = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = (k * kWarp + threadIdx.x) * N;
      if (column >= dim) continue;
      unpack(x_row[k], x_hat[k]);
      unpack(dy_row[k], g[k]);
      float w[N];
      load<Use::kConstant>(weight + column, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x_hat[k][i] *= scale;
        const float term = g[k][i] * x_hat[k][i];
        if constexpr (kWide) own_sums[(k * N + i) * kWarp] += term;
        else dweight[k * N + i] += term;
        g[k][i] *= w[i];
        dot += g[k][i] * x_hat[k][i];
      }
    }
    const float mean = warp_sum(dot) * inverse_dim;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = (k * kWarp + threadIdx.x) * N;
      if (column >= dim) continue;
      float d[N] = {};
      if (dtotal != nullptr) {
        if (!kEarly) dtotal_row[k] = fetch<Use::kOnce, N>(dtotal + at + column);
        unpack(dtotal_row[k], d);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) d[i] += (g[k][i] - x_hat[k][i] * mean) * scale;
      store(dx + at + column, d);
      if (dbranch != nullptr) store(dbranch + at + column, d);
    }
  }
  if constexpr (!kWide) {
#pragma unroll
    for (int i = 0; i < E; ++i) own_sums[i * kWarp] = dweight[i];
  }
  __syncthreads();
  for (int column = threadIdx.y * kWarp + threadIdx.x; column < dim;
       column += kWarp * kRowsPerBlock) {
    const int lane = column / N % kWarp, slot = column / (N * kWarp) * N + column % N;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kRowsPerBlock; ++warp) sum += sums[warp][slot * kWarp + lane];
    store(partial + static_cast<int64_t>(blockIdx.x) * dim + column, {sum});
  }
}

// dx and dbranch alone, for any dim that is a multiple of N. X, Y and W are pointers or Any.
template <int N, class X, class Y, class W>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    rms_norm_bwd_in_passes(Y dy, X dtotal, bool has_dtotal, X x, W weight, const float* rstd, X dx,
                           Y dbranch, bool has_dbranch, int64_t rows, int64_t dim,
                           float inverse_dim) {
  // The general kernel's choices among dtypes fill the registers without unrolling.
  constexpr int kUnroll = N == 1 ? 1 : 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  const int64_t at = row * dim;
  const float scale = __ldg(rstd + row);
  float x_hat[N], g[N], w[N], dot = 0.0f;
  const auto read = [&](int64_t column) {
    load<Use::kAgain>(x + (at + column), x_hat);
    load<Use::kAgain>(dy + (at + column), g);
    load<Use::kConstant>(weight + column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x_hat[i] *= scale;
      g[i] *= w[i];
    }
  };
#pragma unroll kUnroll
  for (int64_t column = threadIdx.x * N; column < dim; column += kWarp * N) {
    read(column);
#pragma unroll
    for (int i = 0; i < N; ++i) dot += g[i] * x_hat[i];
  }
  const float mean = warp_sum(dot) * inverse_dim;
#pragma unroll kUnroll
  for (int64_t column = threadIdx.x * N; column < dim; column += kWarp * N) {
    read(column);
    float d[N] = {};
    if (has_dtotal) load<Use::kOnce>(dtotal + (at + column), d);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] += (g[i] - x_hat[i] * mean) * scale;
    store(dx + (at + column), d);
    if (has_dbranch) store(dbranch + (at + column), d);
  }
}

// Terms of column_sum: what there is to add at (row, column).
struct PartialTerm {
  const float* partial;
  int64_t dim;
  __device__ float operator()(int64_t row, int64_t column) const {
    return __ldcs(partial + row * dim + column);
  }
};

struct WeightTerm {
  Any dy, x;
  const float* rstd;
  int64_t dim;
  __device__ float operator()(int64_t row, int64_t column) const {
    float g[1], v[1];
    load<Use::kOnce>(dy + (row * dim + column), g);
    load<Use::kOnce>(x + (row * dim + column), v);
    return g[0] * (v[0] * __ldg(rstd + row));
  }
};

constexpr int kSumLanes = 16;

// out (gridDim.y, dim): block row b sums its share of the rows. Every thread adds its rows in
// order, then one warp adds the threads in order.
template <class Term>
__global__ void __launch_bounds__(kWarp* kSumLanes)
    column_sum(Term term, Any out, int64_t rows, int64_t dim) {
  __shared__ float sums[kSumLanes][kWarp];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t share = (rows + gridDim.y - 1) / gridDim.y;
  const int64_t first = blockIdx.y * share, last = min(first + share, rows);
  float sum = 0.0f;
  if (column < dim) {
#pragma unroll 4
    for (int64_t row = first + threadIdx.y; row < last; row += kSumLanes) sum += term(row, column);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= dim) return;
  float total[1] = {0.0f};
#pragma unroll
  for (int lane = 0; lane < kSumLanes; ++lane) total[0] += sums[lane][threadIdx.x];
  store(out + (blockIdx.y * dim + column), total);
}

// ---- On the host

const dim3 kBlock(kWarp, kRowsPerBlock);

// Elements of a row that a lane may keep in registers: NeoBERT's 768 columns fit the first.
// Backward keeps two rows, so fewer of each.
constexpr int kSmall = 24, kLarge = 64, kLargeBwd = 48;

// Pairs of types with kernels of their own: one type, or bfloat16 or float16 branches on a float32
// residual stream. Others, and what cannot be accessed in 16 bytes, take the general kernels.
template <class Branch, class Residual>
constexpr bool kSpecialised = std::is_same_v<Branch, Residual> || std::is_same_v<Residual, float>;

}  // namespace

cudaError_t rms_norm(Any x, Any residual, Any weight, float eps, Any y, Any total, float* rstd,
                     int64_t rows, int64_t dim, cudaStream_t stream) {
  const dim3 grid(blocks_for(rows, kRowsPerBlock));
  const float inverse_dim = 1.0f / static_cast<float>(dim);
  const auto specialised = [&](auto x_type, auto residual_type) {
    using X = typename decltype(x_type)::type;
    using R = typename decltype(residual_type)::type;
    const auto start = [&](auto kernel, auto w) {
      return launch(stream, grid, kBlock, kernel, static_cast<X*>(x.data),
                    static_cast<R*>(residual.data), w, eps, static_cast<X*>(y.data),
                    static_cast<R*>(total.data), rstd, rows, dim, inverse_dim);
    };
    if (dim <= kWarp * kSmall && weight.dtype == Dtype::kFloat32)
      return start(rms_norm_in_registers<kSmall, X, R, float*>, static_cast<float*>(weight.data));
    if (dim <= kWarp * kSmall && weight.dtype == x.dtype)
      return start(rms_norm_in_registers<kSmall, X, R, X*>, static_cast<X*>(weight.data));
    if (dim <= kWarp * kLarge) return start(rms_norm_in_registers<kLarge, X, R, Any>, weight);
    return start(rms_norm_in_passes<kAccessWidth<X, R>, X*, R*, Any>, weight);
  };
  const auto general = [&] {
    if (residual.data == nullptr)
      return launch(stream, grid, kBlock, rms_norm_in_passes<1, Any, None*, Any>, x, nullptr,
                    weight, eps, y, nullptr, rstd, rows, dim, inverse_dim);
    return launch(stream, grid, kBlock, rms_norm_in_passes<1, Any, Any, Any>, x, residual, weight,
                  eps, y, total, rstd, rows, dim, inverse_dim);
  };
  const bool is_aligned = aligned(x.data, residual.data, weight.data, y.data, total.data);
  return dispatch(x.dtype, [&](auto x_type) {
    using X = typename decltype(x_type)::type;
    if (residual.data == nullptr)
      return is_aligned && dim % kAccessWidth<X, None> == 0 ? specialised(x_type, Type<None>())
                                                            : general();
    return dispatch(residual.dtype, [&](auto residual_type) {
      using R = typename decltype(residual_type)::type;
      if constexpr (kSpecialised<X, R>)
        if (is_aligned && dim % kAccessWidth<X, R> == 0) return specialised(x_type, residual_type);
      return general();
    });
  });
}

int64_t rms_norm_bwd_partials(int64_t rows) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return std::clamp<int64_t>(rows / (2 * kRowsPerBlock), 1, multiprocessors * kBlocksPerSM);
}

cudaError_t rms_norm_bwd(Any dy, Any dtotal, Any x, Any weight, const float* rstd, Any dx,
                         Any dbranch, Any dweight, float* partial, int64_t partials, int64_t rows,
                         int64_t dim, cudaStream_t stream) {
  const dim3 grid(blocks_for(rows, kRowsPerBlock)), sum_block(kWarp, kSumLanes);
  const float inverse_dim = 1.0f / static_cast<float>(dim);
  const bool has_dtotal = dtotal.data != nullptr, has_dbranch = dbranch.data != nullptr;
  const auto sum_weight_terms = [&](cudaError_t error) {
    if (error != cudaSuccess) return error;
    return launch(stream, dim3(blocks_for(dim, kWarp), static_cast<unsigned>(partials)), sum_block,
                  column_sum<WeightTerm>, WeightTerm{dy, x, rstd, dim},
                  Any{partial, Dtype::kFloat32}, rows, dim);
  };
  const auto specialised = [&](auto x_type, auto y_type) {
    using X = typename decltype(x_type)::type;
    using Y = typename decltype(y_type)::type;
    const auto start = [&](auto kernel, auto w) {
      return launch(stream, dim3(static_cast<unsigned>(partials)), kBlock, kernel,
                    static_cast<Y*>(dy.data),
                    static_cast<X*>(dtotal.data), static_cast<X*>(x.data), w, rstd,
                    static_cast<X*>(dx.data), static_cast<Y*>(dbranch.data), partial, rows, dim,
                    inverse_dim);
    };
    if (dim <= kWarp * kSmall && weight.dtype == Dtype::kFloat32)
      return start(rms_norm_bwd_in_registers<kSmall, X, Y, float*>,
                   static_cast<float*>(weight.data));
    if (dim <= kWarp * kSmall && weight.dtype == dy.dtype)
      return start(rms_norm_bwd_in_registers<kSmall, X, Y, Y*>, static_cast<Y*>(weight.data));
    if (dim <= kWarp * kLargeBwd)
      return start(rms_norm_bwd_in_registers<kLargeBwd, X, Y, Any>, weight);
    return sum_weight_terms(launch(
        stream, grid, kBlock, rms_norm_bwd_in_passes<kAccessWidth<X, Y>, X*, Y*, Any>,
        static_cast<Y*>(dy.data), static_cast<X*>(dtotal.data), has_dtotal,
        static_cast<X*>(x.data), weight, rstd, static_cast<X*>(dx.data),
        static_cast<Y*>(dbranch.data), has_dbranch, rows, dim, inverse_dim));
  };
  const auto general = [&] {
    return sum_weight_terms(launch(stream, grid, kBlock, rms_norm_bwd_in_passes<1, Any, Any, Any>,
                                   dy, dtotal, has_dtotal, x, weight, rstd, dx, dbranch,
                                   has_dbranch, rows, dim, inverse_dim));
  };
  const bool is_aligned =
      aligned(dy.data, dtotal.data, x.data, weight.data, dx.data, dbranch.data);
  const cudaError_t error = dispatch(x.dtype, [&](auto x_type) {
    return dispatch(dy.dtype, [&](auto y_type) {
      using X = typename decltype(x_type)::type;
      using Y = typename decltype(y_type)::type;
      if constexpr (kSpecialised<Y, X>)
        if (is_aligned && dim % kAccessWidth<X, Y> == 0) return specialised(x_type, y_type);
      return general();
    });
  });
  if (error != cudaSuccess) return error;
  return launch(stream, dim3(blocks_for(dim, kWarp)), sum_block, column_sum<PartialTerm>,
                PartialTerm{partial, dim}, dweight, partials, dim);
}

}  // namespace neobert
