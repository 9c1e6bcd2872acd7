// linear and linear_swiglu: x @ weight.T with what follows it in the block done while the result is
// still in the first-level cache.
#include <atomic>
#include <memory>

#include "gemm.h"
#include "kernel.h"

namespace neobert {
namespace {

using namespace gemm;

// The bits of panels that one thread keeps in its second-level cache.
constexpr int64_t kPanelBytes = 400 << 10;
// A task of fewer rows would spend more than 3 % of its time transposing the weight.
constexpr int64_t kMinChunk = 12 * kRows;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class X>
struct Rows {
  const X* data;
  int64_t stride;
  const X* operator[](int64_t i) const { return data + i * stride; }
};

float* panel_memory(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = ceil_div(floats * sizeof(float), 4096) * 4096;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    STD_TORCH_CHECK(memory != nullptr, "linear: out of memory for a panel of ", bytes, " bytes");
    size = floats;
  }
  return memory.get();
}

// Calls epilogue(tile, row, rows, column, columns) for every tile of x @ weight.T. With `halves`
// vectors: a panel's first vector holds columns [c, c + kWidth) and its second those `offset`
// further; `width` columns are covered by the first vectors (and as many by the second).
struct Columns {
  int64_t width;   // columns of the output
  int64_t step;    // output columns per panel
  int64_t offset;  // from the row of weight in a panel's first vector to that in its second
};

template <class Lane, class X, class Epilogue>
void run(Rows<X> x, Rows<X> weight, int64_t tokens, int64_t in_features, Columns columns,
         const Epilogue& epilogue) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panel_floats = lanes_of<Lane>(in_features) * kCols;
  const int64_t panels = ceil_div(columns.width, columns.step);
  // Panels per task: what stays in the cache, but enough tasks for the threads.
  int64_t group = std::max<int64_t>(1, kPanelBytes / static_cast<int64_t>(panel_floats * sizeof(float)));
  group = std::clamp<int64_t>(panels / (4 * threads), 1, group);
  const int64_t groups = ceil_div(panels, group);
  const int64_t chunks = std::clamp<int64_t>(ceil_div(4 * threads, groups), 1,
                                             std::max<int64_t>(1, tokens / kMinChunk));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, groups * chunks), 1, [&](int64_t, int64_t) {
    float* const memory = panel_memory(group * panel_floats);
    alignas(64) float tile[kRows * kCols];
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < groups * chunks;) {
      const int64_t first = task / chunks * group, last = std::min(panels, first + group);
      for (int64_t p = first; p < last; ++p)
        for (int h = 0; h < 2; ++h) {
          const int64_t column = p * columns.step + h * columns.offset;
          const int64_t end = columns.step == kCols ? columns.width : h * columns.offset + columns.width;
          pack<Lane>(weight[column], weight.stride, std::clamp<int64_t>(end - column, 0, kWidth),
                     in_features, memory + (p - first) * panel_floats + h * kWidth);
        }
      // Tiles of nearly equal height: a last one of a row or two would leave the units idle.
      const int64_t begin = tokens * (task % chunks) / chunks;
      const int64_t end = tokens * (task % chunks + 1) / chunks;
      const int64_t tiles = ceil_div(end - begin, kRows);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = begin + (end - begin) * t / tiles;
        const int64_t rows = begin + (end - begin) * (t + 1) / tiles - row;
        for (int64_t p = first; p < last; ++p) {
          multiply<Lane>(x[row], x.stride, rows, in_features, memory + (p - first) * panel_floats,
                         tile);
          const int64_t column = p * columns.step;
          epilogue(tile, row, rows, column, std::min(columns.step, columns.width - column));
        }
      }
    }
  });
}

template <class X, class Epilogue>
void run(const Tensor& x, const Tensor& weight, Columns columns, const Epilogue& epilogue) {
#if defined(__AVX512BF16__)
  using Lane = std::conditional_t<std::is_same_v<X, bf16>, BFloat16Pair, Float32>;
#else
  using Lane = Float32;
#endif
  run<Lane, X>({data<X>(x), x.stride(0)}, {data<X>(weight), weight.stride(0)}, x.size(0), x.size(1),
               columns, epilogue);
}

// Rows may lie apart, their elements may not.
Tensor with_contiguous_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op,
          "x (tokens, in_features) and weight (out_features, in_features) must agree in in_features");
  require(x.scalar_type() == weight.scalar_type(), op, "x and weight must have one dtype");
}

Tensor linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& residual_) {
  check("linear", x_, weight_);
  const Tensor x = with_contiguous_rows(x_), weight = with_contiguous_rows(weight_);
  const int64_t width = weight.size(0);
  std::optional<Tensor> residual;
  if (residual_.has_value()) {
    require(residual_->dim() == 2 && residual_->size(0) == x.size(0) && residual_->size(1) == width,
            "linear", "residual must have shape (tokens, out_features)");
    residual = with_contiguous_rows(*residual_);
  }
  Tensor y = empty_cpu({x.size(0), width}, residual ? residual->scalar_type() : x.scalar_type());
  dispatch("linear", "x", x, [&](auto* x_type) {
    dispatch("linear", "residual", y, [&](auto* y_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Y = std::remove_pointer_t<decltype(y_type)>;
      Y* const out = data<Y>(y);
      const Rows<Y> added = residual ? Rows<Y>{data<Y>(*residual), residual->stride(0)} : Rows<Y>{};
      run<X>(x, weight, {width, kCols, kWidth},
             [=](const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns) {
               for (int64_t r = 0; r < rows; ++r)
                 for (int64_t c = 0; c < columns; c += kWidth) {
                   Vec v = load(tile + r * kCols + c);
                   Y* const to = out + (row + r) * width + column + c;
                   const Y* const from = added.data ? added[row + r] + column + c : nullptr;
                   if (const int n = static_cast<int>(columns - c); n < kWidth) {
                     store(to, from ? v + load(from, n) : v, n);
                   } else {
                     store(to, from ? v + load(from) : v);
                   }
                 }
             });
    });
  });
  return y;
}

Tensor linear_swiglu(const Tensor& x_, const Tensor& weight_) {
  check("linear_swiglu", x_, weight_);
  require(weight_.size(0) % 2 == 0, "linear_swiglu", "weight must have shape (2 * width, in_features)");
  const Tensor x = with_contiguous_rows(x_), weight = with_contiguous_rows(weight_);
  const int64_t width = weight.size(0) / 2;
  Tensor y = empty_cpu({x.size(0), width}, x.scalar_type());
  dispatch("linear_swiglu", "x", x, [&](auto* type) {
    using X = std::remove_pointer_t<decltype(type)>;
    X* const out = data<X>(y);
    run<X>(x, weight, {width, kWidth, width},
           [=](const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns) {
             for (int64_t r = 0; r < rows; ++r) {
               const Vec gate = load(tile + r * kCols), up = load(tile + r * kCols + kWidth);
               const Vec v = gate / (set1(1.0f) + exp(zero() - gate)) * up;
               X* const to = out + (row + r) * width + column;
               columns < kWidth ? store(to, v, static_cast<int>(columns)) : store(to, v);
             }
           });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_swiglu", TORCH_BOX(&linear_swiglu));
}

}  // namespace neobert
