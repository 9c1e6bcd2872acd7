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
// Blocks of k per slab: then the cache holds six panels or so, and a transposed weight is read in
// long pieces.
constexpr int64_t kMaxSlab = 4;
// Tiles of a transposed x that are copied at once, whole cache lines of it: its rows may lie a
// multiple of the caches' size apart, where few lines stay until the next tile.
constexpr int64_t kTransposedTiles = 8;
constexpr int64_t kTile = kRows * kCols;
// A task of fewer rows would spend more than 3 % of its time transposing the weight.
constexpr int64_t kMinChunk = 12 * kRows;
// Of no more tokens a thread keeps a copy in its second-level cache, and no panel: see run_few.
constexpr int64_t kFewTokens = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What the panels of a task may fill: most of a core's second-level cache.
int64_t panel_bytes() {
  static const int64_t bytes = [] {
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return (cache > 0 ? cache : 512 << 10) / 4 * 3;
  }();
  return bytes;
}

// A thread's own buffer: it lives as long as the thread does, so that no call pays for fresh pages.
float* thread_memory(int64_t floats) {
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
//
// A task is a group of panels times a chunk of tokens. Sums too long for the panels to fit the
// cache are cut into slabs: the tiles of a task then wait in memory for their next slab.
template <class Lane, class X, class Epilogue>
struct Product {
  static constexpr int64_t kElements = kBlock * Lane::kPerLane;

  Matrix<X> x, weight;
  int64_t tokens, in_features;
  Columns columns;
  const Epilogue& epilogue;

  int64_t panels = ceil_div(columns.width, columns.step);
  int64_t blocks = std::max<int64_t>(1, ceil_div(in_features, kElements));
  int64_t slabs = ceil_div(in_features, kMaxSlab * kElements);
  int64_t slab = ceil_div(in_features, std::max<int64_t>(1, slabs) * kElements) * kElements;
  int64_t panel_floats = lanes_of<Lane>(std::min(slab, in_features)) * kCols;
  int64_t groups = 1, chunks = 1;

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

  // Whether the tiles of a task wait in memory for their next slab or block.
  bool waits() const { return slabs > 1 || x.transposed(); }
  int64_t first_panel(int64_t task) const { return panels * (task / chunks) / groups; }
  int64_t first_token(int64_t chunk) const { return tokens * chunk / chunks; }

  void run() {
    if (tokens == 0 || panels == 0) return;
    const int64_t threads = torch::stable::get_num_threads();
    split(threads);
    const int64_t tasks = groups * chunks;
    if (tokens <= kFewTokens && !x.transposed() && !weight.transposed())
      return run_few(std::min(threads, tasks), tasks);
    const int64_t panel_memory = ceil_div(panels, groups) * panel_floats;
    const int64_t waiting =
        waits() ? ceil_div(ceil_div(tokens, chunks), kRows) * ceil_div(panels, groups) : 0;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
      float* const memory = thread_memory(panel_memory + waiting * kTile);
      // A thread claims its next task before it works on this one, to fetch its weights meanwhile.
      for (int64_t task = next++, following; task < tasks; task = following) {
        following = next++;
        const int64_t first = first_panel(task), count = first_panel(task + chunks) - first;
        Ahead weights;
        if (following < tasks && following / chunks != task / chunks && slabs == 1 &&
            !weight.transposed()) {
          const int64_t from = first_panel(following) * columns.step;
          const int64_t panel = first_panel(following + chunks);
          const int64_t to = std::min(columns.width, panel * columns.step);
          weights = {reinterpret_cast<const char*>(weight.at(from, 0)), Ahead::kPiece,
                     (to - from) * weight.row * int64_t{sizeof(X)} / Ahead::kPiece};
        }
        const int64_t begin = first_token(task % chunks), end = first_token(task % chunks + 1);
        int64_t at = 0;
        do {  // once at least: sums of no elements are zero
          const int64_t stop = std::min(in_features, at + slab);
          for (int64_t p = 0; p < count; ++p)
            pack_panel(first + p, at, stop, memory + p * panel_floats);
          multiply_rows(begin, end, at, stop, memory, first, count, memory + panel_memory, weights);
          at = stop;
        } while (at < in_features);
      }
    });
  }

  // Of few tokens the time is that of reading the weight, once: a panel written to the second-level
  // cache and read back would add to it. So a block of a panel at a time is packed, into the
  // first-level cache, and multiplied while the next panel is fetched, in the order of memory.
  void run_few(int64_t threads, int64_t tasks) const {
    const int64_t tiles = ceil_div(tokens, kRows), block_floats = tokens * kBlockStride;
    const int64_t floats = kBlock * kCols + tiles * kTile + blocks * block_floats;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      float* const panel = thread_memory(floats);
      float* const sums = panel + kBlock * kCols;
      float* const copy = sums + tiles * kTile;
      for (int64_t b = 0; b < blocks; ++b)
        copy_block<Lane>(x, 0, tokens, b * kElements, std::min(in_features, (b + 1) * kElements),
                         copy + b * block_floats);
      for (int64_t task = next++, following; task < tasks; task = following) {
        following = next++;
        const int64_t after = following < tasks ? first_panel(following) : panels;
        for (int64_t p = first_panel(task), end = first_panel(task + 1); p < end; ++p)
          multiply_few(p, p + 1 < end ? p + 1 : after, panel, copy, sums);
      }
    });
  }

  // The tiles of panel p and all tokens, whose copy is one block after another. Fetches panel
  // `after`, if there is one.
  void multiply_few(int64_t p, int64_t after, float* panel, const float* copy, float* sums) const {
    const int64_t tiles = ceil_div(tokens, kRows);
    const auto first_row = [&](int64_t t) { return tokens * t / tiles; };
    const int64_t column = p * columns.step;
    Ahead ahead;
    if (after < panels && weight.row == in_features) {
      const int64_t row = after * columns.step;
      const int64_t bytes = kWidth * in_features * int64_t{sizeof(X)};
      const int64_t pieces = blocks * tiles * Ahead::kPieces;
      ahead.bytes = ahead.step = ceil_div(bytes, pieces * 64) * 64;
      ahead.count = ahead.bytes > 0 ? ceil_div(bytes, ahead.bytes) : 0;
      ahead.at = reinterpret_cast<const char*>(weight.at(row, 0));
      ahead.second = reinterpret_cast<const char*>(weight.at(row + columns.offset, 0));
    }
    for (int64_t b = 0; b < blocks; ++b, copy += tokens * kBlockStride) {
      const int64_t begin = b * kElements, end = std::min(in_features, begin + kElements);
      pack_panel(p, begin, end, panel);
      for (int64_t t = 0; t < tiles; ++t) {
        float* const tile = sums + t * kTile;
        const int64_t row = first_row(t), rows = first_row(t + 1) - row;
        const int64_t lanes = lanes_of<Lane>(end - begin);
        kTileFns<Lane>[rows - 1](copy + row * kBlockStride, lanes, panel, b == 0, tile, ahead);
        ahead.skip(ceil_div(lanes, Ahead::kLanes));
        if (b + 1 == blocks)
          epilogue(tile, row, rows, column, std::min(columns.step, columns.width - column));
      }
    }
  }

  void pack_panel(int64_t p, int64_t begin, int64_t end, float* panel) const {
    for (int h = 0; h < 2; ++h) {
      const int64_t row = p * columns.step + h * columns.offset;
      const int64_t last = columns.width + (columns.step == kCols ? 0 : h * columns.offset);
      const int rows = static_cast<int>(std::clamp<int64_t>(last - row, 0, kWidth));
      pack<Lane>(weight, row, rows, begin, end, panel + h * kWidth);
    }
  }

  // The tiles of tokens begin … end and panels first … first + count, summed over elements
  // slab_begin … slab_end.
  void multiply_rows(int64_t begin, int64_t end, int64_t slab_begin, int64_t slab_end,
                     const float* memory, int64_t first, int64_t count, float* waiting,
                     Ahead weights) const {
    alignas(64) float at_once[kMaxGroup * kTile] = {};
    alignas(64) float block[kTransposedTiles * kRows * kBlockStride];
    // Tiles of nearly equal height: a last one of a row or two would leave the units idle.
    const int64_t tiles = ceil_div(end - begin, kRows);
    const auto first_row = [&](int64_t t) { return begin + (end - begin) * t / tiles; };
    for (int64_t t = 0, next; t < tiles; t = next) {
      next = std::min(tiles, t + (x.transposed() ? kTransposedTiles : 1));
      const int64_t row = first_row(t), rows = first_row(next) - row;
      float* const sums = waits() ? waiting + t * count * kTile : at_once;
      for (int64_t at = slab_begin; at < slab_end; at += kElements) {
        const int64_t stop = std::min(slab_end, at + kElements), lanes = lanes_of<Lane>(stop - at);
        copy_block<Lane>(x, row, rows, at, stop, block);
        Ahead ahead;
        if (const bool last = stop == slab_end; !x.transposed() && !(last && next == tiles))
          ahead = {reinterpret_cast<const char*>(last ? x.at(row + rows, slab_begin)
                                                      : x.at(row, stop)),
                   x.row * int64_t{sizeof(X)}, rows};
        const float* panel = memory + (at - slab_begin) / Lane::kPerLane * kCols;
        for (int64_t p = 0; p < count; ++p, panel += panel_floats) {
          for (int64_t i = t; i < next; ++i)
            kTileFns<Lane>[first_row(i + 1) - first_row(i) - 1](
                block + (first_row(i) - row) * kBlockStride, lanes, panel, at == 0,
                sums + ((i - t) * count + p) * kTile, ahead);
          if (p > 0) weights.skip(ceil_div(lanes, Ahead::kLanes));
          ahead = weights;
        }
      }
      if (slab_end < in_features) continue;
      for (int64_t i = t; i < next; ++i)
        for (int64_t p = 0; p < count; ++p) {
          const int64_t column = (first + p) * columns.step;
          epilogue(sums + ((i - t) * count + p) * kTile, first_row(i),
                   first_row(i + 1) - first_row(i), column,
                   std::min(columns.step, columns.width - column));
        }
    }
  }
};

bool has_contiguous_rows(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

// Either axis may be the contiguous one; the other's stride is free.
Tensor as_matrix(const Tensor& t) {
  const bool transposed = t.size(0) > 1 && t.stride(0) == 1;
  return has_contiguous_rows(t) || transposed ? t : torch::stable::contiguous(t);
}

template <class X>
Matrix<X> matrix(const Tensor& t) {
  return {data<X>(t), t.stride(0), has_contiguous_rows(t) ? 1 : t.stride(1)};
}

template <class X, class Epilogue>
void run(const Tensor& x, const Tensor& weight, Columns columns, const Epilogue& epilogue) {
#if defined(__AVX512BF16__)
  using Lane = std::conditional_t<std::is_same_v<X, bf16>, BFloat16Pair, Float32>;
#else
  using Lane = Float32;
#endif
  Product<Lane, X, Epilogue>{matrix<X>(x),
                             matrix<X>(weight),
                             x.size(0),
                             x.size(1),
                             columns,
                             epilogue}
      .run();
}

void check(const char* op, const Tensor& x, const Tensor& weight) {
  require(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op,
          "x (tokens, in_features) and weight (out_features, in_features) must agree in in_features");
  require(x.scalar_type() == weight.scalar_type(), op, "x and weight must have one dtype");
}

Tensor linear(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& residual_) {
  check("linear", x_, weight_);
  const Tensor x = as_matrix(x_), weight = as_matrix(weight_);
  const int64_t width = weight.size(0);
  std::optional<Tensor> residual;
  if (residual_.has_value()) {
    require(residual_->dim() == 2 && residual_->size(0) == x.size(0) && residual_->size(1) == width,
            "linear", "residual must have shape (tokens, out_features)");
    residual = *residual_;
    if (!has_contiguous_rows(*residual)) residual = torch::stable::contiguous(*residual);
  }
  Tensor y = empty_cpu({x.size(0), width}, residual ? residual->scalar_type() : x.scalar_type());
  dispatch("linear", "x", x, [&](auto* x_type) {
    dispatch("linear", "residual", y, [&](auto* y_type) {
      using X = std::remove_pointer_t<decltype(x_type)>;
      using Y = std::remove_pointer_t<decltype(y_type)>;
      Y* const out = data<Y>(y);
      const Y* const added = residual ? data<Y>(*residual) : nullptr;
      const int64_t added_stride = residual ? residual->stride(0) : 0;
      run<X>(x, weight, {width, kCols, kWidth},
             [=](const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns) {
               for (int64_t r = 0; r < rows; ++r)
                 for (int64_t c = 0; c < columns; c += kWidth) {
                   Vec v = load(tile + r * kCols + c);
                   Y* const to = out + (row + r) * width + column + c;
                   const Y* const from =
                       added ? added + (row + r) * added_stride + column + c : nullptr;
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
  const Tensor x = as_matrix(x_), weight = as_matrix(weight_);
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
