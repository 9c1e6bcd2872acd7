// linear and linear_swiglu: x @ weight.T with what follows it in the block done while the result is
// still in the first-level cache.
#include <atomic>
#include <memory>
#include <numeric>

#include <unistd.h>

#include "gemm.h"
#include "kernel.h"
#include "sigmoid.h"

namespace neobert {
namespace {

using namespace gemm;

constexpr int64_t kMaxGroup = 16;  // panels per task
// A task of fewer rows would spend more than 3 % of its time transposing the weight.
constexpr int64_t kMinChunk = 12 * kRows;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class X>
struct Rows {
  const X* data;
  int64_t stride;
  const X* operator[](int64_t i) const { return data + i * stride; }
};

// What the panels of a task may fill: most of a core's second-level cache.
int64_t panel_bytes() {
  static const int64_t bytes = [] {
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (cache > 0 ? cache : 512 << 10) / 4 * 3;
  }();
  return bytes;
}

// A thread's own buffers: they live as long as it does, so that no call pays for fresh pages.
float* panel_memory(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    const size_t bytes = ceil_div(floats * sizeof(float), 4096) * 4096;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    size = memory ? floats : 0;
    STD_TORCH_CHECK(memory, "linear: out of memory for a panel of ", bytes, " bytes");
  }
  return memory.get();
}

// Which rows of weight make which panel. Panel p's first vector holds rows [p * step, … + kWidth)
// and its second the rows `offset` further; the first vectors cover rows [0, width).
struct Columns {
  int64_t width;
  int64_t step;
  int64_t offset;
};

// Calls epilogue(tile, row, rows, column, columns) for every tile of x @ weight.T.
template <class Lane, class X, class Epilogue>
struct Product {
  Rows<X> x, weight;
  int64_t tokens, in_features;
  Columns columns;
  const Epilogue& epilogue;

  int64_t panels = ceil_div(columns.width, columns.step);
  int64_t panel_floats = lanes_of<Lane>(in_features) * kCols;
  int64_t groups = 1, chunks = 1;  // of panels, of tokens: a task is one of each

  // As few groups as the cache allows, then enough tasks for threads to end together: chunks where
  // there are tokens enough to pay for packing again, else smaller groups.
  void split(int64_t threads) {
    const int64_t one_panel = std::max<int64_t>(1, panel_floats * sizeof(float));
    groups = ceil_div(panels, std::clamp<int64_t>(panel_bytes() / one_panel, 1, kMaxGroup));
    chunks = std::clamp<int64_t>(tokens / kMinChunk, 1, ceil_div(8 * threads, groups));
    groups = std::max(groups, ceil_div(4 * threads, chunks));
    const int64_t multiple = threads / std::gcd(threads, chunks);
    groups = std::min(panels, ceil_div(groups, multiple) * multiple);
  }

  int64_t first_panel(int64_t task) const { return panels * (task / chunks) / groups; }
  int64_t first_token(int64_t chunk) const { return tokens * chunk / chunks; }

  void run() {
    if (tokens == 0 || panels == 0) return;
    const int64_t threads = torch::stable::get_num_threads();
    split(threads);
    const int64_t tasks = groups * chunks;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
      float* const memory = panel_memory(ceil_div(panels, groups) * panel_floats);
      // A thread claims its next task before it works on this one, to fetch its weights meanwhile.
      for (int64_t task = next++, following; task < tasks; task = following) {
        following = next++;
        const int64_t first = first_panel(task), count = first_panel(task + chunks) - first;
        for (int64_t p = 0; p < count; ++p) pack_panel(first + p, memory + p * panel_floats);
        Ahead weights;
        if (following < tasks && following / chunks != task / chunks) {
          const int64_t from = first_panel(following) * columns.step;
          const int64_t to = std::min(columns.width, first_panel(following + chunks) * columns.step);
          weights = {reinterpret_cast<const char*>(weight[from]), Ahead::kPiece,
                     (to - from) * weight.stride * int64_t{sizeof(X)} / Ahead::kPiece};
        }
        const int64_t chunk = task % chunks;
        multiply_rows(first_token(chunk), first_token(chunk + 1), memory, first, count, weights);
      }
    });
  }

  void pack_panel(int64_t p, float* panel) const {
    for (int h = 0; h < 2; ++h) {
      const int64_t row = p * columns.step + h * columns.offset;
      const int64_t end = columns.step == kCols ? columns.width : columns.width + h * columns.offset;
      pack<Lane>(weight[row], weight.stride, std::clamp<int64_t>(end - row, 0, kWidth), in_features,
                 panel + h * kWidth);
    }
  }

  void multiply_rows(int64_t begin, int64_t end, const float* memory, int64_t first, int64_t count,
                     Ahead weights) const {
    alignas(64) float tile[kMaxGroup][kRows * kCols] = {};
    alignas(64) float block[kRows * kBlockStride];
    constexpr int64_t kElements = kBlock * Lane::kPerLane;
    // Tiles of nearly equal height: a last one of a row or two would leave the units idle.
    const int64_t tiles = ceil_div(end - begin, kRows);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + (end - begin) * t / tiles;
      const int64_t rows = begin + (end - begin) * (t + 1) / tiles - row;
      const TileFn multiply_tile = kTileFns<Lane>[rows - 1];
      for (int64_t at = 0; at < in_features; at += kElements) {
        const int64_t elements = std::min(kElements, in_features - at);
        const int64_t lanes = lanes_of<Lane>(elements);
        copy_block<Lane>(x[row] + at, x.stride, rows, elements, block);
        const bool last = at + kElements >= in_features;
        const X* const next = last ? x[row + rows] : x[row] + at + kElements;
        Ahead ahead{reinterpret_cast<const char*>(next), x.stride * int64_t{sizeof(X)},
                    last && row + rows == end ? 0 : rows};
        for (int64_t p = 0; p < count; ++p) {
          multiply_tile(block, lanes, memory + p * panel_floats + at / Lane::kPerLane * kCols,
                        at == 0, tile[p], ahead);
          if (p > 0) {
            const int64_t pieces = ceil_div(lanes, Ahead::kLanes);
            weights.at += pieces * weights.step;
            weights.count -= pieces;
          }
          ahead = weights;
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        const int64_t column = (first + p) * columns.step;
        epilogue(tile[p], row, rows, column, std::min(columns.step, columns.width - column));
      }
    }
  }
};

template <class X, class Epilogue>
void run(const Tensor& x, const Tensor& weight, Columns columns, const Epilogue& epilogue) {
#if defined(__AVX512BF16__)
  using Lane = std::conditional_t<std::is_same_v<X, bf16>, BFloat16Pair, Float32>;
#else
  using Lane = Float32;
#endif
  Product<Lane, X, Epilogue>{{data<X>(x), x.stride(0)},
                             {data<X>(weight), weight.stride(0)},
                             x.size(0),
                             x.size(1),
                             columns,
                             epilogue}
      .run();
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
             // Two rows at a time: the exponential is one long chain of dependent operations. An
             // odd last row is paired with what an earlier tile left in the row after it.
             for (int64_t r = 0; r < rows; r += 2) {
               const float* const at = tile + r * kCols;
               const Vec gate[2] = {load(at), load(at + kCols)};
               const Vec up[2] = {load(at + kWidth), load(at + kCols + kWidth)};
               Vec v[2];
               silu_times(gate, up, v);
               for (int64_t u = 0; u < std::min<int64_t>(2, rows - r); ++u) {
                 X* const to = out + (row + r + u) * width + column;
                 columns < kWidth ? store(to, v[u], static_cast<int>(columns)) : store(to, v[u]);
               }
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
