// Rotary embedding on adjacent pairs. A block takes one token, or several where a token is small:
// threadIdx.x runs over a row's accesses, y over the rows (heads) of a token, z over tokens.
#include <algorithm>
#include <cmath>

#include "array.cuh"

namespace neobert {
namespace {

constexpr int kRotaryThreads = 256;

// N consecutive elements, A of them per access.
template <Use kUse, int A, int N, class T>
__device__ __forceinline__ void load_by(const T* p, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += A) {
    float part[A];
    load<kUse>(p + i, part);
#pragma unroll
    for (int j = 0; j < A; ++j) out[i + j] = part[j];
  }
}

// Rotates N elements at once in accesses of A; x == y rotates in place. A position outside the
// table gives NaN, for the host cannot look at it without waiting for the device.
template <int N, int A, class T>
__global__ void __launch_bounds__(kRotaryThreads)
    rotary_rows(const T* x, const float* cos, const float* sin, const void* positions,
           bool positions_are_int64, float direction, T* y, RotaryShape shape) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= shape.tokens) return;
  const int64_t position = positions_are_int64
                               ? __ldg(static_cast<const long long*>(positions) + token)
                               : __ldg(static_cast<const int*>(positions) + token);
  const bool inside = position >= 0 && position < shape.max_position;
  const int64_t length = shape.head_dim * shape.heads_per_row;
  for (int64_t row = threadIdx.y; row < shape.rows; row += blockDim.y) {
    const T* from = x + token * shape.x_token_stride + row * shape.x_row_stride;
    T* to = y + token * shape.y_token_stride + row * shape.y_row_stride;
    for (int64_t column = threadIdx.x * N; column < length; column += blockDim.x * N) {
      const int64_t angle = (column < shape.head_dim ? column : column - shape.head_dim) / 2;
      float v[N], c[N / 2], s[N / 2];
      load_by<Use::kAgain, A>(from + column, v);
      if (inside) {
        const int64_t at = position * (shape.head_dim / 2) + angle;
        load_by<Use::kConstant, N / 2>(cos + at, c);
        load_by<Use::kConstant, N / 2>(sin + at, s);
      } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) c[i] = s[i] = NAN;
      }
      float rotated[N];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        const float sine = direction * s[i];
        rotated[2 * i] = v[2 * i] * c[i] - v[2 * i + 1] * sine;
        rotated[2 * i + 1] = v[2 * i] * sine + v[2 * i + 1] * c[i];
      }
#pragma unroll
      for (int i = 0; i < N; i += A) {
        float part[A];
#pragma unroll
        for (int j = 0; j < A; ++j) part[j] = rotated[i + j];
        store(to + column + i, part);
      }
    }
  }
}

}  // namespace

cudaError_t rotary(Any x, const float* cos, const float* sin, const void* positions,
                   bool positions_are_int64, bool inverse, Any y, const RotaryShape& shape,
                   cudaStream_t stream) {
  return dispatch(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int N = 16 / static_cast<int>(sizeof(T));
    const auto start = [&](auto kernel, int elements) {
      const int64_t accesses = shape.head_dim * shape.heads_per_row / elements;
      const int64_t along = std::clamp<int64_t>(accesses, 1, kRotaryThreads);
      const int64_t rows = std::min(shape.rows, kRotaryThreads / along);
      const int64_t tokens = std::min<int64_t>(64, kRotaryThreads / (along * rows));
      const dim3 block(along, rows, tokens);
      return launch(stream, dim3(blocks_for(shape.tokens, block.z)), block, kernel,
                    static_cast<T*>(x.data), cos, sin, positions, positions_are_int64,
                    inverse ? -1.0f : 1.0f, static_cast<T*>(y.data), shape);
    };
    const bool whole_accesses = shape.head_dim % N == 0 && shape.x_token_stride % N == 0 &&
                                shape.x_row_stride % N == 0 && shape.y_token_stride % N == 0 &&
                                shape.y_row_stride % N == 0;
    if (whole_accesses && aligned(x.data, y.data, cos, sin))
      return start(rotary_rows<N, N, T>, N);
    return start(rotary_rows<2, 1, T>, 2);
  });
}

}  // namespace neobert
