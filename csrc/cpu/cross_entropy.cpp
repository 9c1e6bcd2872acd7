// Softmax cross entropy of rows of logits, and in the same call its gradient over the logits.
#include "kernel.h"

namespace neobert {
namespace {

template <class T>
float largest(const T* x, int64_t n) {
  const Vec lowest = set1(-INFINITY);
  Vec best[4] = {lowest, lowest, lowest, lowest};
  for_vectors<4>(n, [&](int64_t i, int u, auto lanes) {
    best[u] = vmax(best[u], fill_after(load(x + i, lanes), lanes, lowest));
  });
  return hmax(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])));
}

template <class T>
float sum_of_exp(const T* x, float shift, int64_t n) {
  Vec sum[4] = {zero(), zero(), zero(), zero()};
  for_groups<4>(n, [&](int64_t i, auto count, auto lanes) {
    Vec e[count.value];
    for (int u = 0; u < count.value; ++u) {
      const Vec v = load(x + i + u * kWidth, lanes) - set1(shift);
      e[u] = fill_after(v, lanes, set1(-INFINITY));
    }
    exp(e);
    for (int u = 0; u < count.value; ++u) sum[u] = sum[u] + e[u];
  });
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// x = scale * (softmax(x) - onehot(label)). At the label it is scale * (e^-loss - 1), which expm1
// keeps from cancelling where the label is all but certain.
template <class T>
void to_gradient(T* x, float shift, float sum, float loss, float scale, int64_t label, int64_t n) {
  const Vec factor = set1(scale / sum);
  for_groups<4>(n, [&](int64_t i, auto count, auto lanes) {
    Vec e[count.value];
    for (int u = 0; u < count.value; ++u) e[u] = load(x + i + u * kWidth, lanes) - set1(shift);
    exp(e);
    for (int u = 0; u < count.value; ++u) store(x + i + u * kWidth, e[u] * factor, lanes);
  });
  x[label] = static_cast<T>(std::expm1(-loss) * scale);
}

Tensor rows_loss(const char* op, const Tensor& logits, const Tensor& labels_, float scale,
                 bool gradient) {
  require(logits.dim() == 2 && logits.is_contiguous(), op,
          "logits must be contiguous with shape (rows, vocab)");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  require(labels_.scalar_type() == ScalarType::Long && labels_.dim() == 1 &&
              labels_.size(0) == rows,
          op, "labels must be int64 with shape (rows,)");
  const Tensor labels = as_contiguous(labels_);
  const int64_t* label = data<int64_t>(labels);
  for (int64_t row = 0; row < rows; ++row)
    require<std::out_of_range>(label[row] >= 0 && label[row] < vocab, op, "labels must lie in [0, ",
                               vocab, "), got ", label[row], " for row ", row);
  Tensor losses = empty_cpu({rows}, ScalarType::Float);
  dispatch(op, "logits", logits, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel(rows, (gradient ? 4 : 2) * vocab * sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* x = data<T>(logits) + row * vocab;
        const float shift = largest(x, vocab);
        const float sum = sum_of_exp(x, shift, vocab);
        // Never shift + log(sum), which would be rounded at the size of the logits.
        const float loss = std::log(sum) - (static_cast<float>(x[label[row]]) - shift);
        data<float>(losses)[row] = loss;
        if (gradient) to_gradient(x, shift, sum, loss, scale, label[row], vocab);
      }
    });
  });
  return losses;
}

Tensor cross_entropy_rows(const Tensor& logits, const Tensor& labels) {
  return rows_loss("cross_entropy_rows", logits, labels, 0.0f, false);
}

Tensor cross_entropy_rows_grad_(Tensor logits, const Tensor& labels, double scale) {
  return rows_loss("cross_entropy_rows_grad_", logits, labels, static_cast<float>(scale), true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows));
  m.impl("cross_entropy_rows_grad_", TORCH_BOX(&cross_entropy_rows_grad_));
}

}  // namespace neobert
