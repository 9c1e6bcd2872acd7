// Rotary embedding on adjacent pairs. A block takes one token, or several where a token is small:
// threadIdx.x runs over a row's accesses, y over the rows (heads) of a token, z over tokens.
#include <algorithm>
#include <cmath>

#include "array.cuh"

namespace neobert {
namespace {

constexpr int kRotaryThreads = 256;
constexpr int kRowsAtOnce = 4;

// Rotates N elements at a time, in accesses of A, of up to kRowsAtOnce rows, which share cos and
// sin; x == y rotates in place. A position outside the table gives NaN, for the host cannot look at
// it without waiting for the device.
template <int N, int A, class T>
__global__ void __launch_bounds__(kRotaryThreads)
    rotary_rows(const T* x, const float* cos, const float* sin, const void* positions,
                bool positions_are_int64, float direction, T* y, RotaryShape shape) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= shape.tokens) return;
  x += token * shape.x_token_stride;
  y += token * shape.y_token_stride;
  const int length = shape.head_dim * shape.heads_per_row;
  for (int first = threadIdx.y; first < shape.rows; first += blockDim.y * kRowsAtOnce) {
    for (int column = threadIdx.x * N; column < length; column += blockDim.x * N) {
      // x is on its way while the position, and then the angles there, are waited for.
      Fetched<T, A> fetched[kRowsAtOnce][N / A];
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int row = first + r * blockDim.y;
        if (row >= shape.rows) continue;
#pragma unroll
        for (int i = 0; i < N / A; ++i)
          fetched[r][i] = fetch<Use::kOnce, A>(x + row * shape.x_row_stride + column + i * A);
      }
      const int64_t position = positions_are_int64
                                   ? __ldg(static_cast<const long long*>(positions) + token)
                                   : __ldg(static_cast<const int*>(positions) + token);
      float c[N / 2], s[N / 2];
      if (position >= 0 && position < shape.max_position) {
        const int angle = (column < shape.head_dim ? column : column - shape.head_dim) / 2;
        const int64_t at = position * (shape.head_dim / 2) + angle;
        load<Use::kConstant>(cos + at, c);
        load<Use::kConstant>(sin + at, s);
      } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) c[i] = s[i] = NAN;
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int row = first + r * blockDim.y;
        if (row >= shape.rows) continue;
        float v[N / A][A];
#pragma unroll
        for (int i = 0; i < N / A; ++i) unpack(fetched[r][i], v[i]);
#pragma unroll
        for (int i = 0; i < N; i += 2) {
          float& even = v[i / A][i % A];
          float& odd = v[(i + 1) / A][(i + 1) % A];
          const float sine = direction * s[i / 2], before = even;
          even = even * c[i / 2] - odd * sine;
          odd = before * sine + odd * c[i / 2];
        }
#pragma unroll
        for (int i = 0; i < N / A; ++i)
          store(y + row * shape.y_row_stride + column + i * A, v[i]);
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
      const int accesses = shape.head_dim * shape.heads_per_row / elements;
      const int along = std::clamp(accesses, 1, kRotaryThreads);
      const int rows =
          std::min((shape.rows + kRowsAtOnce - 1) / kRowsAtOnce, kRotaryThreads / along);
      const int tokens = std::min(64, kRotaryThreads / (along * rows));
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
