// One float32 vector per packed sequence, and the gradient of its tokens.
#include "kernel.h"

namespace neobert {
namespace {

constexpr int64_t kColumns = 256, kRun = 128;

// out = the sum of the rows of x: eight at a time as a tree, those over runs of 128 rows, and the
// runs in order. The order depends only on the tokens of the sequence itself, and the rounding
// errors hardly grow with their number.
template <class T>
void sum_rows(const T* x, int64_t stride, int64_t rows, float* out, int64_t columns) {
  float run[kColumns];
  std::fill_n(out, columns, 0.0f);
  for (int64_t first = 0; first < rows; first += kRun) {
    const int64_t last = std::min(rows, first + kRun);
    std::fill_n(run, columns, 0.0f);
    int64_t row = first;
    for (; row + 8 <= last; row += 8)
      for_vectors(columns, [&](int64_t i, int, auto lanes) {
        Vec v[8];
        for (int k = 0; k < 8; ++k) v[k] = load(x + (row + k) * stride + i, lanes);
        const Vec sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        store(run + i, load(run + i, lanes) + sum, lanes);
      });
    for (; row < last; ++row)
      for_vectors(columns, [&](int64_t i, int, auto lanes) {
        store(run + i, load(run + i, lanes) + load(x + row * stride + i, lanes), lanes);
      });
    for_vectors(columns, [&](int64_t i, int, auto lanes) {
      store(out + i, load(out + i, lanes) + load(run + i, lanes), lanes);
    });
  }
}

Tensor pool(const Tensor& hidden_, const Tensor& cu_seqlens_, bool mean) {
  require(hidden_.dim() == 2, "pool", "hidden must have shape (tokens, dim)");
  const Tensor hidden = as_contiguous(hidden_), cu_seqlens = as_contiguous(cu_seqlens_);
  const int64_t tokens = hidden.size(0), dim = hidden.size(1);
  check_cu_seqlens("pool", cu_seqlens, tokens);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  const int32_t* offsets = data<int32_t>(cu_seqlens);
  Tensor pooled = empty_cpu({sequences, dim}, ScalarType::Float);
  // A task is some columns of one sequence, so that a long sequence does not wait for one thread.
  const int64_t slices = (dim + kColumns - 1) / kColumns, tasks = sequences * slices;
  dispatch("pool", "hidden", hidden, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* x = data<T>(hidden);
    const int64_t bytes = (mean ? offsets[sequences] : sequences) * dim * sizeof(T);
    parallel(tasks, bytes / std::max<int64_t>(1, tasks), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sequence = task % sequences, column = task / sequences * kColumns;
        const int64_t columns = std::min(kColumns, dim - column);
        const int64_t start = offsets[sequence], length = offsets[sequence + 1] - start;
        float* out = data<float>(pooled) + sequence * dim + column;
        const int64_t rows = mean ? length : std::min<int64_t>(1, length);
        sum_rows(x + start * dim + column, dim, rows, out, columns);
        if (!mean || length == 0) continue;
        const Vec divisor = set1(static_cast<float>(length));
        for_vectors(columns, [&](int64_t i, int, auto lanes) {
          store(out + i, load(out + i, lanes) / divisor, lanes);
        });
      }
    });
  });
  return pooled;
}

Tensor pool_bwd(const Tensor& dpooled_, const Tensor& cu_seqlens_, int64_t tokens, bool mean,
                ScalarType dtype) {
  const Tensor dpooled = as_float(dpooled_), cu_seqlens = as_contiguous(cu_seqlens_);
  check_cu_seqlens("pool_bwd", cu_seqlens, tokens);
  const int64_t sequences = cu_seqlens.size(0) - 1;
  require(dpooled.dim() == 2 && dpooled.size(0) == sequences, "pool_bwd",
          "dpooled must have shape (sequences, dim)");
  const int64_t dim = dpooled.size(1);
  const int32_t* offsets = data<int32_t>(cu_seqlens);
  Tensor dhidden = empty_cpu({tokens, dim}, dtype);
  dispatch("pool_bwd", "hidden", dhidden, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(tokens, dim * sizeof(T), [&](int64_t begin, int64_t end) {
      std::vector<T> share(dim);  // every token's part of its sequence's gradient
      int64_t sequence = std::upper_bound(offsets, offsets + sequences + 1, begin) - offsets - 1;
      for (int64_t t = begin; t < end; ++sequence) {
        const bool beyond = sequence >= sequences;
        const int64_t start = offsets[std::min(sequence, sequences)];
        const int64_t stop = beyond ? end : std::min<int64_t>(end, offsets[sequence + 1]);
        if (t >= stop) continue;  // an empty sequence
        std::fill(share.begin(), share.end(), T(0.0f));
        if (!beyond) {
          const float length = mean ? static_cast<float>(offsets[sequence + 1] - start) : 1.0f;
          const float* d = data<float>(dpooled) + sequence * dim;
          for_vectors(dim, [&](int64_t i, int, auto lanes) {
            store(share.data() + i, load(d + i, lanes) / set1(length), lanes);
          });
        }
        for (; t < stop; ++t) {
          T* row = data<T>(dhidden) + t * dim;
          if (mean || t == start) std::copy_n(share.data(), dim, row);
          else std::fill_n(row, dim, T(0.0f));
        }
      }
    });
  });
  return dhidden;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_bwd", TORCH_BOX(&pool_bwd));
}

}  // namespace neobert
