// Rotary position embedding on adjacent pairs, into a new tensor and in place on packed q, k, v.
#include "kernel.h"
#include "pair.h"

namespace neobert {
namespace {

struct Table {
  const float *cos, *sin;  // (max_position, half)
  int64_t max_position, half;
};

// Turns the kWidth adjacent pairs (x0, x1) of a Pair into (x0 cos - x1 sin, x1 cos + x0 sin).
template <bool kSplit>
class Turn;

template <>
class Turn<true> {  // x0 and x1 are lanes of two vectors
 public:
  Turn(Vec cos, Vec sin) : cos_(cos), sin_(sin) {}
  Pair operator()(Pair x) const {
    return {fnmadd(x.b, sin_, x.a * cos_), fmadd(x.a, sin_, x.b * cos_)};
  }

 private:
  Vec cos_, sin_;
};

template <>
class Turn<false> {  // x0 and x1 are neighbours in one vector
 public:
  Turn(Vec cos, Vec sin)
      : cos_{first_twice(cos), second_twice(cos)}, sin_{first_twice(sin), second_twice(sin)} {}
  Pair operator()(Pair x) const {
    return {fmaddsub(x.a, cos_.a, swap_pairs(x.a) * sin_.a),
            fmaddsub(x.b, cos_.b, swap_pairs(x.b) * sin_.b)};
  }

 private:
  Pair cos_, sin_;
};

Whole half_of(Whole) { return {}; }
Lanes half_of(Lanes lanes) { return {lanes.n / 2}; }

// Where a token's heads lie, in elements.
struct Layout {
  int64_t heads, head_dim, x_stride, y_stride;
};

// Rotates kParts neighbours of head_dim elements in every head of a token; y may be x. cos and sin
// stay in registers from head to head. `ahead` is asked for, elements from what is being read.
template <int kParts, bool kStream, class T>
void rotate(const T* x, T* y, Layout layout, const float* cos, const float* sin, bool inverse,
            int64_t ahead) {
  constexpr bool kSplit = kSplits<T>;
  const auto [heads, head_dim, x_stride, y_stride] = layout;
  const Vec sign = set1(inverse ? -1.0f : 1.0f);
  for_pairs<2>(head_dim, [&](int64_t i, auto pairs, auto lanes) {
    auto turn_at = [&](int64_t at) {
      return Turn<kSplit>(load(cos + at / 2, half_of(lanes)),
                          load(sin + at / 2, half_of(lanes)) * sign);
    };
    const Turn<kSplit> turns[] = {turn_at(i), turn_at(i + (pairs.value - 1) * kPair)};
    const T* from = x + i;
    T* to = y + i;
    for (int64_t h = 0; h < heads; ++h, from += x_stride, to += y_stride) {
#pragma GCC unroll 4
      for (int u = 0; u < kParts * pairs.value; ++u) {
        const int64_t at = u / pairs.value * head_dim + u % pairs.value * kPair;
        if constexpr (kParts > 1) prefetch_pairs(from + at + ahead);
        const Pair turned = turns[u % pairs.value](load_pair<kSplit>(from + at, lanes));
        store_pair<kSplit, kStream>(to + at, turned, lanes);
      }
    }
  });
}

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

// Calls f(t, cos, sin) for every token t, with its position's rows of the table.
template <class F>
void for_tokens(const char* op, const Tensor& positions, const Table& table, int64_t token_bytes,
                F&& f) {
  auto run = [&](auto* p) {
    const int64_t tokens = positions.numel();
    check_positions(op, p, tokens, table.max_position);
    parallel(tokens, token_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        f(t, table.cos + p[t] * table.half, table.sin + p[t] * table.half);
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
               const Tensor& positions) {
  const int64_t head_dim = x.size(-1);
  require(cos.dim() == 2 && same_shape(cos, sin) && 2 * cos.size(1) == head_dim &&
              cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float,
          op, "cos and sin must be float32 with shape (max_position, head_dim / 2)");
  require(positions.dim() == 1 && positions.size(0) == x.size(0), op,
          "positions must have shape (tokens,)");
  return {data<float>(cos), data<float>(sin), cos.size(0), cos.size(1)};
}

Tensor rotary(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, const Tensor& positions_,
              bool inverse) {
  require(x_.dim() == 3, "apply_rotary", "x must have shape (tokens, heads, head_dim)");
  const Tensor x = x_.stride(2) == 1 ? x_ : torch::stable::contiguous(x_);
  const Tensor cos = as_contiguous(cos_), sin = as_contiguous(sin_);
  const Tensor positions = as_contiguous(positions_);
  const Table table = table_of("apply_rotary", x, cos, sin, positions);
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  Tensor y = torch::stable::empty(x.sizes(), x.scalar_type());
  dispatch("apply_rotary", "x", x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = data<T>(x);
    T* out = data<T>(y);
    const int64_t token_stride = x.stride(0);
    const Layout layout{heads, head_dim, x.stride(1), head_dim};
    choose(worth_streaming(tokens * heads, head_dim, out), [&](auto stream) {
      for_tokens("apply_rotary", positions, table, 2 * heads * head_dim * sizeof(T),
                 [&](int64_t t, const float* cos_t, const float* sin_t) {
                   rotate<1, stream.value>(in + t * token_stride, out + t * heads * head_dim,
                                           layout, cos_t, sin_t, inverse, 0);
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
  const Table table = table_of("apply_rotary_qkv_", qkv, cos, sin, positions);
  const int64_t heads = qkv.size(1), head_dim = qkv.size(3);
  dispatch("apply_rotary_qkv_", "qkv", qkv, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* base = data<T>(qkv);
    const Layout layout{heads, head_dim, 3 * head_dim, 3 * head_dim};
    // Every third piece is left out, at which the hardware's own prefetching loses its way.
    const int64_t ahead = 2 * heads * 3 * head_dim;
    for_tokens("apply_rotary_qkv_", positions, table, 4 * heads * head_dim * sizeof(T),
               [&](int64_t t, const float* cos_t, const float* sin_t) {
                 T* token = base + t * heads * 3 * head_dim;
                 rotate<2, false>(token, token, layout, cos_t, sin_t, inverse, ahead);
               });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rotary_qkv_", TORCH_BOX(&rotary_qkv_));
}

}  // namespace neobert
