// What every CPU kernel file includes: tensors, argument checks, dtype dispatch, threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "simd.h"

namespace neobert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, fp16>) return ScalarType::Half;
}

// Python sees std::invalid_argument as ValueError and std::out_of_range as IndexError.
template <class Error = std::invalid_argument, class... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
  if (ok) [[likely]] return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw Error(message.str());
}

// Calls f(T*) with a null pointer whose type is the tensor's element type.
template <class F>
void dispatch(const char* op, const char* argument, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<fp16*>(nullptr));
    default:
      require(false, op, "the CPU kernel serves float32, bfloat16 and float16, but ", argument,
              " has another dtype");
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor as_float(const Tensor& t) { return as_contiguous(as_dtype(t, ScalarType::Float)); }

inline std::vector<int64_t> sizes_of(const Tensor& t) { return t.sizes().vec(); }

inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

// Offsets as packed batches carry them: int32, from 0, never falling, not beyond the tokens.
inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t tokens) {
  require(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 &&
              cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous(),
          op, "cu_seqlens must be contiguous int32 with shape (sequences + 1,)");
  const int32_t* offsets = data<int32_t>(cu_seqlens);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  require(offsets[0] == 0, op, "cu_seqlens must begin with 0, got cu_seqlens[0] = ", offsets[0]);
  for (int64_t i = 0; i < sequences; ++i)
    require(offsets[i] <= offsets[i + 1], op, "cu_seqlens must never fall, got cu_seqlens[", i + 1,
            "] = ", offsets[i + 1], " after cu_seqlens[", i, "] = ", offsets[i]);
  require(offsets[sequences] <= tokens, op, "cu_seqlens must end at or before the ", tokens,
          " tokens, got cu_seqlens[", sequences, "] = ", offsets[sequences]);
}

// Calls f(begin, end) on ranges of [0, tasks). Waking a second thread costs about 5 us, in which a
// core moves 200 KB through its caches: less than twice that in all is not worth a second thread.
template <class F>
void parallel(int64_t tasks, int64_t bytes_per_task, F&& f) {
  const int64_t grain = std::max<int64_t>(1, (512 << 10) / std::max<int64_t>(1, bytes_per_task));
  torch::stable::parallel_for(0, tasks, grain, f);
}

// Bytes of the last cache that a core can use, 32 MiB where the system does not tell. sysconf() is not
// asked: of an AMD processor it gives the sum over the socket, 384 MiB where a core has 32.
inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t kib = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;
    return (kib > 0 ? kib : 32 << 10) << 10;
  }();
  return bytes;
}

// Whether to write these outputs of (rows, dim) past the caches. An ordinary store first reads the
// line that it overwrites, a third of all traffic in a copy; a streaming store does not, but its
// reader finds nothing in the cache. So it is for outputs of half the last cache or more, of which
// little would be left by the time the next op reads them: RMSNorm of 8,192 x 768 float32 rises
// from 1.07 to 1.44 of the speed of torch's copy, at 4,096 rows from 1.08 to 1.14, and with half
// the bytes it falls. Whole vectors only: every row must begin at a multiple of 64 bytes.
template <class... T>
bool worth_streaming(int64_t rows, int64_t dim, const T*... outputs) {
  const int64_t bytes = (0 + ... + (rows * dim * static_cast<int64_t>(sizeof(T))));
  auto aligned = [&](auto* p) {
    return reinterpret_cast<uintptr_t>(p) % 64 == 0 && dim * sizeof(*p) % 64 == 0;
  };
  return bytes >= last_cache_bytes() / 2 && (aligned(outputs) && ...);
}

// f(std::true_type) or f(std::false_type): a run-time choice as a template argument.
template <class F>
void choose(bool yes, F&& f) {
  yes ? f(std::true_type{}) : f(std::false_type{});
}

}  // namespace neobert
