// Rotary position embedding on adjacent pairs, into a new tensor and in place on packed q, k, v.
#include "kernel.h"

namespace neobert {
namespace {

struct Table {
  const float *cos, *sin;  // (max_position, half)
  int64_t max_position, half;
  bool inverse;
};

// One token's cos and sin, each twice, for the two lanes of its pair; the inverse negates sin.
class Rotation {
 public:
  explicit Rotation(const Table& table)
      : table_(table), cos_(2 * table.half + kWidth), sin_(2 * table.half + kWidth) {}

  void set(int64_t position) {
    const float* cos = table_.cos + position * table_.half;
    const float* sin = table_.sin + position * table_.half;
    const float sign = table_.inverse ? -1.0f : 1.0f;
    int64_t i = 0;
    for (; i + kWidth / 2 <= table_.half; i += kWidth / 2) {
      store(cos_.data() + 2 * i, load_twice(cos + i));
      store(sin_.data() + 2 * i, load_twice(sin + i) * set1(sign));
    }
    for (; i < table_.half; ++i) {
      cos_[2 * i] = cos_[2 * i + 1] = cos[i];
      sin_[2 * i] = sin_[2 * i + 1] = sign * sin[i];
    }
  }

  // y = (x0 cos - x1 sin, x1 cos + x0 sin) for every pair; x may be y.
  template <bool kStream, class T>
  void apply(const T* x, T* y) const {
    for_vectors<4>(2 * table_.half, [&](int64_t i, int, auto lanes) {
      const Vec v = load(x + i, lanes);
      const Vec crossed = swap_pairs(v) * load(sin_.data() + i);
      store<kStream>(y + i, fmaddsub(v, load(cos_.data() + i), crossed), lanes);
    });
  }

 private:
  const Table& table_;
  std::vector<float> cos_, sin_;
};

// Before anything is written. 8,192 positions take about a microsecond.
template <class P>
void check_positions(const char* op, const P* positions, int64_t tokens, int64_t max_position) {
  bool ok = true;
  for (int64_t t = 0; t < tokens; ++t) ok &= positions[t] >= 0 && positions[t] < max_position;
  if (ok) return;
  const P* bad = std::find_if(positions, positions + tokens,
                              [&](P p) { return p < 0 || p >= max_position; });
  require<std::out_of_range>(false, op, "positions must lie in [0, ", max_position,
                             "), the rows of cos and sin, got ", *bad, " for token ",
                             bad - positions);
}

// Calls f(rotation, t) on every token, its rotation set.
template <class F>
void for_tokens(const char* op, const Tensor& positions, const Table& table, int64_t token_bytes,
                F&& f) {
  auto run = [&](auto* p) {
    const int64_t tokens = positions.numel();
    check_positions(op, p, tokens, table.max_position);
    parallel(tokens, token_bytes, [&](int64_t begin, int64_t end) {
      Rotation rotation(table);
      for (int64_t t = begin; t < end; ++t) {
        rotation.set(p[t]);
        f(rotation, t);
      }
      _mm_sfence();
    });
  };
  if (positions.scalar_type() == ScalarType::Int) {
    run(data<int32_t>(positions));
  } else {
    require(positions.scalar_type() == ScalarType::Long, op, "positions must be int64 or int32");
    run(data<int64_t>(positions));
  }
}

Table table_of(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin,
               const Tensor& positions, bool inverse) {
  const int64_t head_dim = x.size(-1);
  require(cos.dim() == 2 && same_shape(cos, sin) && 2 * cos.size(1) == head_dim &&
              cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float,
          op, "cos and sin must be float32 with shape (max_position, head_dim / 2)");
  require(positions.dim() == 1 && positions.size(0) == x.size(0), op,
          "positions must have shape (tokens,)");
  return {data<float>(cos), data<float>(sin), cos.size(0), cos.size(1), inverse};
}

Tensor rotary(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_,
              bool inverse) {
  require(x_.dim() == 3, "apply_rotary", "x must have shape (tokens, heads, head_dim)");
  const Tensor x = x_.stride(2) == 1 ? x_ : torch::stable::contiguous(x_);
  const Tensor cos = as_contiguous(cos_), sin = as_contiguous(sin_);
  const Tensor positions = as_contiguous(positions_);
  const Table table = table_of("apply_rotary", x, cos, sin, positions, inverse);
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type());
  dispatch("apply_rotary", "x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = data<T>(x);
    T* out = data<T>(y);
    const int64_t token_stride = x.stride(0), head_stride = x.stride(1);
    choose(worth_streaming(tokens * heads, head_dim, out), [&](auto stream) {
      for_tokens("apply_rotary", positions, table, 2 * heads * head_dim * sizeof(T),
                 [&](const Rotation& rotation, int64_t t) {
                   for (int64_t h = 0; h < heads; ++h)
                     rotation.template apply<stream.value>(in + t * token_stride + h * head_stride,
                                                           out + (t * heads + h) * head_dim);
                 });
    });
  });
  return y;
}

void rotary_qkv_(Tensor qkv, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_,
                 bool inverse) {
  require(qkv.dim() == 4 && qkv.size(2) == 3 && qkv.is_contiguous(), "apply_rotary_qkv_",
          "qkv must be contiguous with shape (tokens, heads, 3, head_dim)");
  const Tensor cos = as_contiguous(cos_), sin = as_contiguous(sin_);
  const Tensor positions = as_contiguous(positions_);
  const Table table = table_of("apply_rotary_qkv_", qkv, cos, sin, positions, inverse);
  const int64_t heads = qkv.size(1), head_dim = qkv.size(3);
  dispatch("apply_rotary_qkv_", "qkv", qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* base = data<T>(qkv);
    for_tokens("apply_rotary_qkv_", positions, table, 4 * heads * head_dim * sizeof(T),
               [&](const Rotation& rotation, int64_t t) {
                 for (int64_t h = 0; h < heads; ++h) {
                   T* q = base + (t * heads + h) * 3 * head_dim;
                   rotation.template apply<false>(q, q);
                   rotation.template apply<false>(q + head_dim, q + head_dim);
                 }
               });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_qkv_", TORCH_BOX(&rotary_qkv_));
}

}  // namespace neobert
