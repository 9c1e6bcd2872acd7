// The CUDA kernels as PyTorch ops: checks, allocation, stream, registration. The LibTorch stable
// ABI only, and no dispatcher call unless an argument must be copied: for a few hundred tokens the
// host's time is the op's time.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace neobert {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

int32_t device_type(const Tensor& t) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type;
}

// A kernel reads only what lies on the device it runs on.
void require_device(const char* op, const char* name, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(device_type(t) == device_type(first) &&
                      t.get_device_index() == first.get_device_index(),
                  op, ": ", name, " is not on the CUDA device of the first argument");
}

void require_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  require_device(op, name, t, x);
  STD_TORCH_CHECK(same_shape(t, x), op, ": ", name, " must have the shape of x ", shape_of(x),
                  ", got ", shape_of(t));
}

Dtype dtype_of(const char* op, const char* argument, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::BFloat16) return Dtype::kBf16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, op,
                  ": the CUDA kernel serves float32, bfloat16 and float16, but ", argument, " is ",
                  torch::headeronly::toString(dtype));
  return Dtype::kFp16;
}

Any array(const Tensor& t, Dtype dtype) { return {t.data_ptr(), dtype}; }

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Contiguous, uninitialised, on the device of `like`.
Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, Dtype dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  const int32_t code = dtype == Dtype::kFloat32 ? aoti_torch_dtype_float32()
                       : dtype == Dtype::kBf16  ? aoti_torch_dtype_bfloat16()
                                                : aoti_torch_dtype_float16();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type(like),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor empty_like(const Tensor& like, Dtype dtype) { return empty(like, like.sizes(), dtype); }

// While it lives, the device of a tensor is the current one; its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) {
    const int32_t device = t.get_device_index();
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device) guard_.emplace(device);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
};

// ---- RMSNorm

int64_t norm_dim(const char* op, const Tensor& x, const Tensor& weight) {
  require_device(op, "weight", weight, x);
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), op,
                  ": weight must have one element per column of x ", shape_of(x), ", got ",
                  shape_of(weight));
  return weight.size(0);
}

struct Norm {
  Tensor y, rstd;
  std::optional<Tensor> total;
};

Norm norm(const char* op, const Tensor& x_, const Tensor* residual_, const Tensor& weight_,
          double eps) {
  const int64_t dim = norm_dim(op, x_, weight_);
  const Dtype x_dtype = dtype_of(op, "x", x_), weight_dtype = dtype_of(op, "weight", weight_);
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  Norm out{empty_like(x, x_dtype),
           empty(x, {x.sizes().data(), static_cast<size_t>(x.dim() - 1)}, Dtype::kFloat32),
           std::nullopt};
  std::optional<Tensor> residual;
  Any residual_array{nullptr, x_dtype}, total_array{nullptr, x_dtype};
  if (residual_ != nullptr) {
    require_like(op, "residual", *residual_, x);
    const Dtype dtype = dtype_of(op, "residual", *residual_);
    residual = as_contiguous(*residual_);
    out.total = empty_like(x, dtype);
    residual_array = array(*residual, dtype);
    total_array = array(*out.total, dtype);
  }
  if (const int64_t rows = out.rstd.numel(); rows > 0) {
    const OnDeviceOf device(x);
    STD_CUDA_CHECK(neobert::rms_norm(array(x, x_dtype), residual_array,
                                     array(weight, weight_dtype), static_cast<float>(eps),
                                     array(out.y, x_dtype), total_array, floats(out.rstd), rows,
                                     dim, device.stream()));
  }
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  Norm out = norm("rms_norm", x, nullptr, weight, eps);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_op(const Tensor& x, const Tensor& residual,
                                                   const Tensor& weight, double eps) {
  Norm out = norm("add_rms_norm", x, &residual, weight, eps);
  return {out.y, *out.total, out.rstd};
}

struct NormGradients {
  Tensor dx, dweight;
  std::optional<Tensor> dbranch;  // dx in the dtype of dy
};

NormGradients norm_bwd(const char* op, const Tensor& dy_, const std::optional<Tensor>& dtotal_,
                       const Tensor& x_, const Tensor& weight_, const Tensor& rstd_,
                       bool with_dbranch) {
  const int64_t dim = norm_dim(op, x_, weight_);
  const Dtype x_dtype = dtype_of(op, "x", x_), y_dtype = dtype_of(op, "dy", dy_);
  const Dtype weight_dtype = dtype_of(op, "weight", weight_);
  require_like(op, "dy", dy_, x_);
  require_device(op, "rstd", rstd_, x_);
  const int64_t rows = rstd_.numel();
  STD_TORCH_CHECK(rstd_.scalar_type() == ScalarType::Float && rows * dim == x_.numel(), op,
                  ": rstd must be float32 with one element per row of x ", shape_of(x_), ", got ",
                  shape_of(rstd_));
  const Tensor dy = as_contiguous(dy_), x = as_contiguous(x_), weight = as_contiguous(weight_);
  const Tensor rstd = as_contiguous(rstd_);
  std::optional<Tensor> dtotal;
  if (dtotal_.has_value()) {
    require_like(op, "dtotal", *dtotal_, x);
    STD_TORCH_CHECK(dtype_of(op, "dtotal", *dtotal_) == x_dtype, op,
                    ": dtotal must have the dtype of x, got ",
                    torch::headeronly::toString(dtotal_->scalar_type()), " and ",
                    torch::headeronly::toString(x.scalar_type()));
    dtotal = as_contiguous(*dtotal_);
  }
  NormGradients out{empty_like(x, x_dtype), empty(x, {&dim, 1}, weight_dtype), std::nullopt};
  if (with_dbranch) out.dbranch = empty_like(x, y_dtype);
  if (x.numel() == 0) {
    torch::stable::zero_(out.dweight);
    return out;
  }
  const OnDeviceOf device(x);
  const int64_t partials = rms_norm_bwd_partials(rows), partial_sizes[] = {partials, dim};
  const Tensor partial = empty(x, {partial_sizes, 2}, Dtype::kFloat32);
  STD_CUDA_CHECK(neobert::rms_norm_bwd(
      array(dy, y_dtype), {dtotal ? dtotal->data_ptr() : nullptr, x_dtype}, array(x, x_dtype),
      array(weight, weight_dtype), floats(rstd), array(out.dx, x_dtype),
      {out.dbranch ? out.dbranch->data_ptr() : nullptr, y_dtype},
      array(out.dweight, weight_dtype), floats(partial), partials, rows, dim, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_bwd_op(const Tensor& dy, const std::optional<Tensor>& dtotal,
                                           const Tensor& x, const Tensor& weight,
                                           const Tensor& rstd) {
  NormGradients out = norm_bwd("rms_norm_bwd", dy, dtotal, x, weight, rstd, false);
  return {out.dx, out.dweight};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_bwd_op(const Tensor& dy,
                                                       const std::optional<Tensor>& dtotal,
                                                       const Tensor& total, const Tensor& weight,
                                                       const Tensor& rstd) {
  NormGradients out = norm_bwd("add_rms_norm_bwd", dy, dtotal, total, weight, rstd, true);
  return {*out.dbranch, out.dx, out.dweight};
}

// ---- SwiGLU

int64_t swiglu_width(const char* op, const Tensor& gate_up) {
  const int64_t dims = gate_up.dim();
  STD_TORCH_CHECK(dims > 0 && gate_up.size(dims - 1) % 2 == 0, op,
                  ": gate_up must have shape (..., 2 * width), got ", shape_of(gate_up));
  return gate_up.size(dims - 1) / 2;
}

Tensor swiglu_op(const Tensor& gate_up_) {
  const int64_t width = swiglu_width("swiglu", gate_up_);
  const Dtype dtype = dtype_of("swiglu", "gate_up", gate_up_);
  const Tensor gate_up = as_contiguous(gate_up_);
  std::vector<int64_t> sizes = gate_up.sizes().vec();
  sizes.back() = width;
  const Tensor y = empty(gate_up, {sizes.data(), sizes.size()}, dtype);
  if (y.numel() == 0) return y;
  const OnDeviceOf device(y);
  STD_CUDA_CHECK(neobert::swiglu(array(gate_up, dtype), array(y, dtype), y.numel() / width, width,
                                 device.stream()));
  return y;
}

Tensor swiglu_bwd_op(const Tensor& dy_, const Tensor& gate_up_) {
  const char* op = "swiglu_bwd";
  const int64_t width = swiglu_width(op, gate_up_);
  const Dtype dtype = dtype_of(op, "gate_up", gate_up_);
  require_device(op, "dy", dy_, gate_up_);
  std::vector<int64_t> expected = gate_up_.sizes().vec();
  expected.back() = width;
  STD_TORCH_CHECK(dy_.sizes().vec() == expected && dtype_of(op, "dy", dy_) == dtype, op,
                  ": dy must have the dtype of gate_up, ",
                  torch::headeronly::toString(gate_up_.scalar_type()),
                  ", and half the last axis of ", shape_of(gate_up_), ", got ",
                  torch::headeronly::toString(dy_.scalar_type()), " ", shape_of(dy_));
  const Tensor dy = as_contiguous(dy_), gate_up = as_contiguous(gate_up_);
  const Tensor dgate_up = empty_like(gate_up, dtype);
  if (dy.numel() == 0) return dgate_up;
  const OnDeviceOf device(dy);
  STD_CUDA_CHECK(neobert::swiglu_bwd(array(dy, dtype), array(gate_up, dtype),
                                     array(dgate_up, dtype), dy.numel() / width, width,
                                     device.stream()));
  return dgate_up;
}

// ---- Rotary

// Rotates x into y, which lie in memory as `shape` says.
void rotate(const char* op, const Tensor& x, const Tensor& cos_, const Tensor& sin_,
            const Tensor& positions_, bool inverse, const Tensor& y, RotaryShape shape) {
  const Dtype dtype = dtype_of(op, "x", x);
  for (const auto& [name, table] : {std::pair("cos", &cos_), std::pair("sin", &sin_)}) {
    require_device(op, name, *table, x);
    STD_TORCH_CHECK(table->scalar_type() == ScalarType::Float && table->dim() == 2 &&
                        table->size(1) * 2 == shape.head_dim && same_shape(*table, cos_),
                    op, ": ", name, " must be float32 of shape (max_position, ",
                    shape.head_dim / 2, "), like cos ", shape_of(cos_), ", got ",
                    torch::headeronly::toString(table->scalar_type()), " ", shape_of(*table));
  }
  require_device(op, "positions", positions_, x);
  const bool is_int64 = positions_.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((is_int64 || positions_.scalar_type() == ScalarType::Int) &&
                      positions_.dim() == 1 && positions_.size(0) == shape.tokens,
                  op, ": positions must be int64 or int32 of shape (", shape.tokens, "), got ",
                  torch::headeronly::toString(positions_.scalar_type()), " ",
                  shape_of(positions_));
  if (y.numel() == 0) return;
  const Tensor cos = as_contiguous(cos_), sin = as_contiguous(sin_);
  const Tensor positions = as_contiguous(positions_);
  shape.max_position = cos.size(0);
  const OnDeviceOf device(y);
  STD_CUDA_CHECK(neobert::rotary(array(x, dtype), floats(cos), floats(sin), positions.data_ptr(),
                                 is_int64, inverse, array(y, dtype), shape, device.stream()));
}

// Heads and head_dim are counted in int: a row of 2^30 elements is a mistake.
int count(const char* op, int64_t size) {
  STD_TORCH_CHECK(size < 1 << 30, op, ": heads and head_dim must be below 2^30, got ", size);
  return static_cast<int>(size);
}

Tensor rotary_op(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                 bool inverse) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0 && (x.stride(2) == 1 || x.size(2) == 0),
                  "rotary: x must have shape (tokens, heads, head_dim) with an even, contiguous "
                  "last axis, got ",
                  shape_of(x));
  const Tensor y = empty_like(x, dtype_of("rotary", "x", x));
  RotaryShape shape{};
  shape.tokens = x.size(0);
  shape.rows = count("rotary", x.size(1));
  shape.head_dim = count("rotary", x.size(2));
  shape.heads_per_row = 1;
  shape.x_token_stride = x.stride(0);
  shape.x_row_stride = x.stride(1);
  shape.y_token_stride = x.size(1) * x.size(2);
  shape.y_row_stride = x.size(2);
  rotate("rotary", x, cos, sin, positions, inverse, y, shape);
  return y;
}

// q and k of a head lie side by side: one row of two heads. v is not touched.
void rotary_qkv_op(Tensor qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                   bool inverse) {
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) == 3 && qkv.size(3) % 2 == 0 && qkv.is_contiguous(),
                  "rotary_qkv_: qkv must be contiguous with shape (tokens, heads, 3, head_dim) and "
                  "an even head_dim, got ",
                  shape_of(qkv));
  RotaryShape shape{};
  shape.tokens = qkv.size(0);
  shape.rows = count("rotary_qkv_", qkv.size(1));
  shape.head_dim = count("rotary_qkv_", qkv.size(3));
  shape.heads_per_row = 2;
  shape.x_token_stride = shape.y_token_stride = qkv.size(1) * 3 * qkv.size(3);
  shape.x_row_stride = shape.y_row_stride = 3 * qkv.size(3);
  rotate("rotary_qkv_", qkv, cos, sin, positions, inverse, qkv, shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_op));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd_op));
  m.impl("add_rms_norm_bwd", TORCH_BOX(&add_rms_norm_bwd_op));
  m.impl("swiglu", TORCH_BOX(&swiglu_op));
  m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd_op));
  m.impl("rotary", TORCH_BOX(&rotary_op));
  m.impl("rotary_qkv_", TORCH_BOX(&rotary_qkv_op));
}

}  // namespace neobert
