// What every CUDA kernel file includes: element types as floats, wide accesses, warp sums,
// launches. Kernels touch global memory only through fetch, load and store, in the words below, so
// that a host emulation (tests/cuda_emulation) can check every access.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"

namespace neobert {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarp = 32;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(v);
  else return v;
}

template <int kBytes>
struct Word;
template <>
struct Word<16> { using type = uint4; };
template <>
struct Word<8> { using type = uint2; };
template <>
struct Word<4> { using type = uint1; };
template <>
struct Word<2> { using type = ushort1; };

// A hint for wide accesses. kOnce: nothing reads it again soon, so it should not push what will be
// read out of the caches. kConstant: nothing writes it while the kernel runs, and many warps read
// it.
enum class Use { kAgain, kOnce, kConstant };

template <class T, int N>
struct Access {
  static constexpr int kBytes = N * sizeof(T) < 16 ? N * static_cast<int>(sizeof(T)) : 16;
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  using Bits = typename Word<kBytes>::type;
};

// N elements on their way from memory, still as they lie there.
template <class T, int N>
struct Fetched {
  typename Access<T, N>::Bits bits[N / Access<T, N>::kElements];
};

// Starts reading N consecutive elements, in 16-byte accesses, or in a single one where they are
// fewer bytes; p must be aligned to the access.
template <Use kUse, int N, class T>
__device__ __forceinline__ Fetched<T, N> fetch(const T* p) {
  using A = Access<T, N>;
  Fetched<T, N> fetched;
  const auto* bits = reinterpret_cast<const typename A::Bits*>(p);
#pragma unroll
  for (int i = 0; i < N / A::kElements; ++i) {
    if constexpr (kUse == Use::kOnce && A::kBytes >= 8) fetched.bits[i] = __ldcs(bits + i);
    else if constexpr (kUse == Use::kConstant && A::kBytes >= 8) fetched.bits[i] = __ldg(bits + i);
    else fetched.bits[i] = bits[i];
  }
  return fetched;
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Fetched<T, N>& fetched, float (&out)[N]) {
  T elements[N];
  memcpy(elements, fetched.bits, sizeof(elements));
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(elements[i]);
}

template <Use kUse, int N, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[N]) {
  unpack(fetch<kUse, N>(p), out);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const float (&values)[N]) {
  using A = Access<T, N>;
#pragma unroll
  for (int i = 0; i < N; i += A::kElements) {
    T elements[A::kElements];
#pragma unroll
    for (int j = 0; j < A::kElements; ++j) elements[j] = from_float<T>(values[i + j]);
    typename A::Bits bits;
    memcpy(&bits, elements, sizeof(bits));
    *reinterpret_cast<typename A::Bits*>(p + i) = bits;
  }
}

__device__ __forceinline__ Any operator+(Any a, int64_t elements) {
  return {static_cast<char*>(a.data) + elements * (a.dtype == Dtype::kFloat32 ? 4 : 2), a.dtype};
}

template <Use kUse, int N>
__device__ __forceinline__ void load(Any p, float (&out)[N]) {
  if (p.dtype == Dtype::kFloat32) load<kUse>(static_cast<const float*>(p.data), out);
  else if (p.dtype == Dtype::kBf16) load<kUse>(static_cast<const bf16*>(p.data), out);
  else load<kUse>(static_cast<const fp16*>(p.data), out);
}

// Which access this takes is known only when it is made.
template <Use kUse, int N>
__device__ __forceinline__ Any fetch(Any p) {
  return p;
}

template <int N>
__device__ __forceinline__ void unpack(Any p, float (&out)[N]) {
  load<Use::kConstant>(p, out);
}

template <int N>
__device__ __forceinline__ void store(Any p, const float (&values)[N]) {
  if (p.dtype == Dtype::kFloat32) store(static_cast<float*>(p.data), values);
  else if (p.dtype == Dtype::kBf16) store(static_cast<bf16*>(p.data), values);
  else store(static_cast<fp16*>(p.data), values);
}

// What v becomes when it is stored behind p and read back.
template <class T>
__device__ __forceinline__ float rounded(const T*, float v) {
  return to_float(from_float<T>(v));
}

__device__ __forceinline__ float rounded(Any p, float v) {
  if (p.dtype == Dtype::kFloat32) return v;
  return p.dtype == Dtype::kBf16 ? to_float(from_float<bf16>(v)) : to_float(from_float<fp16>(v));
}

// The sum over the warp, in every lane; always added in the same order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) v += __shfl_xor_sync(0xffffffffu, v, other);
  return v;
}

// ---- On the host

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>()) with the element type.
template <class F>
auto dispatch(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat32) return f(Type<float>());
  if (dtype == Dtype::kBf16) return f(Type<bf16>());
  return f(Type<fp16>());
}

template <class... Pointer>
bool aligned(Pointer... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// More blocks than a grid holds stay too many, and the launch reports it.
inline unsigned blocks_for(int64_t count, int64_t each) {
  return static_cast<unsigned>(std::min<int64_t>((count + each - 1) / each, 0xffffffff));
}

template <class... P, class... A>
cudaError_t launch(cudaStream_t stream, dim3 grid, dim3 block, void (*kernel)(P...),
                   const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace neobert
