// What every CPU kernel file includes: tensors, argument checks, dtype dispatch, threads.
#pragma once

#include <algorithm>
#include <cmath>
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

// Calls f(T*) with a null pointer whose type is the tensor's element type.
template <class F>
void dispatch(const char* op, const char* argument, const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half: return f(static_cast<fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, op, ": the CPU kernel serves float32, bfloat16 and float16, but ",
                      argument, " has another dtype");
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor as_float(const Tensor& t) {
  return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

inline Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

inline void require(bool ok, const char* op, const char* what) {
  STD_TORCH_CHECK(ok, op, ": ", what);
}

// Rows per task: small enough to balance, large enough (about 64 KiB) to pay for the hand-over.
inline int64_t row_grain(int64_t row_bytes) {
  return std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(1, row_bytes));
}

}  // namespace neobert
