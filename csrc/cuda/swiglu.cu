// SwiGLU, forward and backward: N elements of gate and as many of up per thread. Where dim is small
// a block takes several rows (threadIdx.y).
#include "array.cuh"

namespace neobert {
namespace {

constexpr int kSwigluThreads = 256;

// With t = exp(-|v|): sigmoid(v) = (v < 0 ? t : 1) / (1 + t), where nothing overflows. float32
// takes the exact functions; for 16-bit types those of the special function unit are precise enough
// (about 2^-17 at worst) and leave the kernel bound by memory instead of by instructions.
template <class T>
__device__ __forceinline__ float sigmoid(float v) {
  if constexpr (std::is_same_v<T, float>) {
    const float t = expf(-fabsf(v));
    return (v < 0.0f ? t : 1.0f) / (1.0f + t);
  } else {
    const float t = __expf(-fabsf(v));
    return __fdividef(v < 0.0f ? t : 1.0f, 1.0f + t);
  }
}

// y = gate * sigmoid(gate) * up.
template <int N, class T>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_rows(const T* gate_up, T* y, int64_t rows, int64_t width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const T* gates = gate_up + row * 2 * width;
  for (int64_t column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    float gate[N], up[N];
    load<Use::kOnce>(gates + column, gate);
    load<Use::kOnce>(gates + width + column, up);
#pragma unroll
    for (int i = 0; i < N; ++i) up[i] *= gate[i] * sigmoid<T>(gate[i]);
    store(y + row * width + column, up);
  }
}

// With s = sigmoid(gate): dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s.
template <int N, class T>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_bwd_rows(const T* dy, const T* gate_up, T* dgate_up, int64_t rows, int64_t width) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  for (int64_t column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    const int64_t at = row * 2 * width + column;
    float gate[N], up[N], d[N];
    load<Use::kOnce>(gate_up + at, gate);
    load<Use::kOnce>(gate_up + at + width, up);
    load<Use::kOnce>(dy + row * width + column, d);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float s = sigmoid<T>(gate[i]);
      const float dup = d[i] * gate[i] * s;
      gate[i] = d[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
      up[i] = dup;
    }
    store(dgate_up + at, gate);
    store(dgate_up + at + width, up);
  }
}

// ---- On the host

// Threads along a row up to the block's size; what is left over takes more rows.
dim3 block_for(int64_t accesses) {
  unsigned x = 1;
  while (x < kSwigluThreads && x < accesses) x *= 2;
  return dim3(x, kSwigluThreads / x);
}

// Calls f(Type<T>(), N): 16 bytes per access where every row of every array allows it, else one
// element.
template <class F>
cudaError_t choose_width(Dtype dtype, bool is_aligned, int64_t width, F&& f) {
  return dispatch(dtype, [&](auto type) {
    constexpr int N = 16 / static_cast<int>(sizeof(typename decltype(type)::type));
    if (is_aligned && width % N == 0) return f(type, std::integral_constant<int, N>());
    return f(type, std::integral_constant<int, 1>());
  });
}

}  // namespace

cudaError_t swiglu(Any gate_up, Any y, int64_t rows, int64_t width, cudaStream_t stream) {
  const bool is_aligned = aligned(gate_up.data, y.data);
  return choose_width(y.dtype, is_aligned, width, [&](auto type, auto elements) {
    using T = typename decltype(type)::type;
    const dim3 block = block_for(blocks_for(width, elements()));
    return launch(stream, dim3(blocks_for(rows, block.y)), block, swiglu_rows<elements(), T>,
                  static_cast<T*>(gate_up.data), static_cast<T*>(y.data), rows, width);
  });
}

cudaError_t swiglu_bwd(Any dy, Any gate_up, Any dgate_up, int64_t rows, int64_t width,
                       cudaStream_t stream) {
  const bool is_aligned = aligned(dy.data, gate_up.data, dgate_up.data);
  return choose_width(dy.dtype, is_aligned, width, [&](auto type, auto elements) {
    using T = typename decltype(type)::type;
    const dim3 block = block_for(blocks_for(width, elements()));
    return launch(stream, dim3(blocks_for(rows, block.y)), block, swiglu_bwd_rows<elements(), T>,
                  static_cast<T*>(dy.data), static_cast<T*>(gate_up.data),
                  static_cast<T*>(dgate_up.data), rows, width);
  });
}

}  // namespace neobert
