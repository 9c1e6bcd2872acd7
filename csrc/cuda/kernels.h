// The CUDA kernels as ops.cpp calls them: plain arrays, already checked, none of them empty. No
// torch headers on this side, which keeps nvcc's time in seconds.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace neobert {

enum class Dtype : int { kFloat32, kBf16, kFp16 };

// An array whose element type is known only at run time.
struct Any {
  void* data;
  Dtype dtype;
};

// y = norm(x), or total = residual + x and y = norm(total) where residual.data is not null. All
// contiguous: x, residual, y, total (rows, dim), weight (dim,), rstd (rows,).
cudaError_t rms_norm(Any x, Any residual, Any weight, float eps, Any y, Any total, float* rstd,
                     int64_t rows, int64_t dim, cudaStream_t stream);

// dtotal.data may be null; dtotal has the dtype of x. dbranch.data may be null; it is dx in the
// dtype of dy. partial: scratch of (partials, dim) with partials = rms_norm_bwd_partials(rows) of
// the current device.
int64_t rms_norm_bwd_partials(int64_t rows);
cudaError_t rms_norm_bwd(Any dy, Any dtotal, Any x, Any weight, const float* rstd, Any dx,
                         Any dbranch, Any dweight, float* partial, int64_t partials, int64_t rows,
                         int64_t dim, cudaStream_t stream);

// gate_up (rows, 2 * width), y and dy (rows, width), contiguous and of one dtype.
cudaError_t swiglu(Any gate_up, Any y, int64_t rows, int64_t width, cudaStream_t stream);
cudaError_t swiglu_bwd(Any dy, Any gate_up, Any dgate_up, int64_t rows, int64_t width,
                       cudaStream_t stream);

struct RotaryShape {
  int64_t tokens, max_position;
  // A row is one head, or q and k of a head side by side (heads_per_row = 2) in a packed
  // projection.
  int rows, head_dim, heads_per_row;
  int64_t x_token_stride, x_row_stride, y_token_stride, y_row_stride;
};

// cos, sin (max_position, head_dim / 2), positions (tokens,) int64 or int32. x and y of one dtype,
// a row contiguous in both; y may be x.
cudaError_t rotary(Any x, const float* cos, const float* sin, const void* positions,
                   bool positions_are_int64, bool inverse, Any y, const RotaryShape& shape,
                   cudaStream_t stream);

}  // namespace neobert
