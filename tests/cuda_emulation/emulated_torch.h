// Included before ops.cpp: the ops are registered for CPU tensors in EMULATED_NAMESPACE, the
// kernels may touch only the tensors whose addresses the ops ask for, and fresh tensors hold NaN.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

namespace emulation {

inline AOTITorchError get_data_ptr(AtenTensorHandle tensor, void** data) {
  int64_t dims = 0, numel = 0, *sizes = nullptr, *strides = nullptr, last = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dims);
  aoti_torch_get_numel(tensor, &numel);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  const AOTITorchError error = aoti_torch_get_data_ptr(tensor, data);
  for (int64_t i = 0; i < dims; ++i) last += (sizes[i] - 1) * strides[i];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(*data);
  const uintptr_t end = begin + (last + 1) * aoti_torch_dtype_element_size(dtype);
  if (numel > 0) tensors.push_back({begin, end});
  return error;
}

inline AOTITorchError empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                    int32_t dtype, int32_t device_type, int32_t device_index,
                                    AtenTensorHandle* tensor) {
  const AOTITorchError error = aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type,
                                                        device_index, tensor);
  void* data = nullptr;
  int64_t numel = 0;
  aoti_torch_get_data_ptr(*tensor, &data);
  aoti_torch_get_numel(*tensor, &numel);
  // All bits set is NaN in float32, bfloat16 and float16.
  if (numel > 0) std::memset(data, 0xff, numel * aoti_torch_dtype_element_size(dtype));
  return error;
}

inline AOTITorchError current_device(int32_t* index) {
  *index = -1;  // the index of every CPU tensor
  return 0;
}

inline AOTITorchError current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace emulation

#define aoti_torch_get_data_ptr emulation::get_data_ptr
#define aoti_torch_empty_strided emulation::empty_strided
#define aoti_torch_get_current_device_index emulation::current_device
#define aoti_torch_get_current_cuda_stream emulation::current_stream

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(EMULATED_NAMESPACE, CPU, m, C10_UID)
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call)                                                                   \
  if (const cudaError_t error = (call); error != cudaSuccess)                                  \
    throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(error)))

// For the tests: forgets what earlier calls touched; `descending` turns the order of threads
// around.
extern "C" __attribute__((visibility("default"))) void emulation_start(bool descending) {
  emulation::tensors.clear();
  emulation::wide_accesses = emulation::narrow_accesses = 0;
  emulation::descending = descending;
}
extern "C" __attribute__((visibility("default"))) int64_t emulation_accesses(bool wide) {
  return wide ? emulation::wide_accesses : emulation::narrow_accesses;
}
