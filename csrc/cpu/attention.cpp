// Attention over packed sequences, forward. One piece of work is some query rows of one sequence
// and head: keys and values are packed once per block of keys, and kTileRows queries at a time go
// through scores, softmax and weighted sum while their scores are in the L1 cache. Sequences up to
// a block of keys see the plain softmax; longer ones rescale as Milakov and Gimelshein (2018) do.
#include "varlen.h"

namespace neobert {
namespace {

template <class T>
struct Forward {
  Rows<const T> q, k, v;
  T* out;      // (tokens, heads, head_dim)
  float* lse;  // (heads, tokens)
  int64_t tokens, heads, dim;
  float sign;        // of the scale: scores are kept as ±q·k, so that the largest weighs most
  float scale;       // its magnitude
};

// Keys of a block: their packed K and V fill half of a 1 MiB L2 cache.
int64_t key_block(int64_t dim) {
  return std::clamp<int64_t>((64 << 10) / std::max<int64_t>(1, dim) / 2, kTileColumns, 512) /
         kTileColumns * kTileColumns;
}

// One row of scores to probabilities relative to its running maximum `max`, which it may raise.
// Adds to `sum` and returns what everything summed before must be multiplied by. The scale enters
// here, in one rounding with the subtraction.
template <class Dot>
float softmax_row(const float* scores, typename Dot::Value* p, int64_t keys, float scale_log2,
                  bool first, float& max, float& sum) {
  const int64_t whole = keys / kWidth * kWidth;
  const int tail = static_cast<int>(keys - whole);
  Vec highest = set1(-INFINITY);
  for (int64_t j = 0; j < whole; j += kWidth) highest = vmax(highest, load(scores + j));
  if (tail > 0)
    highest = vmax(highest, keep_first(load(scores + whole), tail, set1(-INFINITY)));
  const float row_max = hmax(highest);
  const float new_max = first ? row_max : std::max(max, row_max);

  const Vec scale = set1(scale_log2), shift = set1(new_max * scale_log2);
  const auto weigh = [&](Vec s) { return exp2<Dot::kExpDegree>(fmsub(s, scale, shift)); };
  Vec total = zero();
  const auto put = [&](int64_t j, Vec value) {
    total = total + value;
    if constexpr (Dot::kDepth == 1) {
      store(p + j, value);
    } else {
#if defined(__AVX512BF16__)
      store16(p + j, (__m256i)_mm512_cvtneps_pbh(value));
#endif
    }
  };
  for (int64_t j = 0; j < whole; j += kWidth) put(j, weigh(load(scores + j)));
  if (tail > 0) put(whole, keep_first(weigh(load(scores + whole)), tail, zero()));
  const float rescale = first ? 0.0f : std::exp2((max - new_max) * scale_log2);
  sum = (first ? 0.0f : sum * rescale) + hsum(total);
  max = new_max;
  return rescale;
}

template <class T, class Dot>
void attend(const Forward<T>& args, const Part& part, int64_t head, int64_t next_head) {
  using Value = typename Dot::Value;
  static thread_local Buffer<Value> keys_buffer, values_buffer, p_buffer, q_buffer;
  static thread_local Buffer<float> scores_buffer, out_buffer, stats_buffer;

  const int64_t dim = args.dim, steps = ceil_div(dim, Dot::kDepth);
  const int64_t columns = round_up(dim, kWidth), out_vecs = columns / kWidth;
  const int64_t block = std::min(key_block(dim), part.length);
  const int64_t padded = round_up(block, kTileColumns), rows = part.end - part.begin;
  const int64_t panel = kTileColumns * steps * Dot::kDepth;
  const bool one_block = block == part.length;

  Value* keys = keys_buffer.at_least(padded / kTileColumns * panel);
  Value* values = values_buffer.at_least(padded * columns);
  float* scores = scores_buffer.at_least(kTileRows * padded);
  float* sums = out_buffer.at_least(one_block ? 1 : rows * columns);
  float* row_max = stats_buffer.at_least(2 * rows);
  float* row_sum = row_max + rows;
  Value* p = nullptr;
  if constexpr (std::is_same_v<Value, float>) {
    p = scores;
  } else {
    p = p_buffer.at_least(kTileRows * padded);
  }
  // Widened rows of q, where its elements are not what the products take.
  constexpr bool q_in_place = std::is_same_v<T, Value>;
  Value* widened = q_in_place ? nullptr : q_buffer.at_least(kTileRows * columns);

  const Vec sign = set1(args.sign);
  const int64_t groups = ceil_div(rows, kTileRows);
  for (int64_t k0 = 0; k0 < part.length; k0 += block) {
    const int64_t n = std::min(block, part.length - k0), key_vecs = ceil_div(n, kWidth);
    const bool first = k0 == 0, last = k0 + n == part.length;
    pack_as_columns<Dot>(args.k.at(part.start + k0, head), args.k.token_stride, n, dim, keys);
    pack_as_steps<Dot>(args.v.at(part.start + k0, head), args.v.token_stride, n, dim, columns,
                       values);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t row = rows * g / groups;
      const int count = static_cast<int>(rows * (g + 1) / groups - row);
      const int64_t token = part.start + part.begin + row;

      if (last && next_head >= 0)
        for (int i = 0; i < count; ++i)
          for (const auto* rows : {&args.q, &args.k, &args.v})
            prefetch_row(rows->at(token + i, next_head), dim);

      OperandA<Value> q_rows{nullptr, columns, Dot::kDepth};
      if constexpr (q_in_place) {
        q_rows = {args.q.at(token, head), args.q.token_stride, Dot::kDepth};
      } else {
        pack_as_steps<Dot>(args.q.at(token, head), args.q.token_stride, count, dim, columns,
                           widened);
        q_rows.data = widened;
      }
      multiply<Dot>(
          count, key_vecs, q_rows, OperandB<Value>{keys, kTileColumns * Dot::kDepth, panel}, steps,
          [&](int i, int64_t v, Vec s) { store(scores + i * padded + v * kWidth, s * sign); });

      float rescale[kTileRows];
      for (int i = 0; i < count; ++i)
        rescale[i] = softmax_row<Dot>(scores + i * padded, p + i * padded, n, args.scale * kLog2E,
                                      first, row_max[row + i], row_sum[row + i]);

      float inverse[kTileRows];
      for (int i = 0; i < count; ++i) inverse[i] = 1.0f / row_sum[row + i];
      multiply<Dot>(
          count, out_vecs, OperandA<Value>{p, padded, Dot::kDepth},
          OperandB<Value>{values, columns * Dot::kDepth, kTileColumns * Dot::kDepth},
          ceil_div(n, Dot::kDepth),
          [&](int i, int64_t v, Vec sum) {
            float* so_far = sums + (row + i) * columns + v * kWidth;
            if (!first) sum = fmadd(load(so_far), set1(rescale[i]), sum);
            if (last) {
              T* to = args.out + ((token + i) * args.heads + head) * dim;
              store_vec(to, v, dim, sum * set1(inverse[i]));
            } else {
              store(so_far, sum);
            }
          });
      if (last)
        for (int i = 0; i < count; ++i)
          args.lse[head * args.tokens + token + i] = static_cast<float>(
              double{row_max[row + i]} * args.scale + std::log(double{row_sum[row + i]}));
    }
  }
}

// Query rows per piece of work: all of a short sequence; of a long one fewer where there would not
// be enough pieces to keep every thread busy. Rows do not see the division: only the time does.
std::vector<Part> divide(const std::vector<int64_t>& offsets, int64_t heads) {
  constexpr int64_t kFewest = 64, kMost = 512;
  double pairs = 0;
  for (size_t i = 1; i < offsets.size(); ++i) {
    const double length = static_cast<double>(offsets[i] - offsets[i - 1]);
    pairs += length * length * heads;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const double share = threads == 1 ? pairs : pairs / (8.0 * threads);
  std::vector<Part> parts;
  for (size_t i = 1; i < offsets.size(); ++i) {
    const int64_t start = offsets[i - 1], length = offsets[i] - start;
    if (length == 0) continue;
    const int64_t most = std::clamp(static_cast<int64_t>(share / length), kFewest, kMost);
    const int64_t count = ceil_div(length, most);
    for (int64_t j = 0; j < count; ++j)
      parts.push_back({start, length, length * j / count, length * (j + 1) / count});
  }
  return parts;
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens, int64_t max_seqlen,
                                            double scale) {
  constexpr const char* kOp = "varlen_attention";
  check_rows(kOp, "q", q, q);
  check_rows(kOp, "k", k, q);
  check_rows(kOp, "v", v, q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const std::vector<int64_t> offsets = checked_offsets(kOp, cu_seqlens, max_seqlen, tokens);
  Tensor out = torch::stable::empty(q.sizes(), q.scalar_type());
  Tensor lse = empty_cpu({heads, tokens}, ScalarType::Float);
  if (q.numel() == 0) return {out, torch::stable::zero_(lse)};

  std::vector<Part> parts = divide(offsets, heads);
  dispatch_dot(kOp, q, [&](auto* type, auto* dot) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Dot = std::remove_pointer_t<decltype(dot)>;
    const Forward<T> args{rows_of<T>(q), rows_of<T>(k), rows_of<T>(v), data<T>(out),
                          data<float>(lse), tokens, heads, dim, scale < 0 ? -1.0f : 1.0f,
                          static_cast<float>(std::abs(scale))};
    for_each_part(parts, heads, 4 * dim, [&](const Part& part, int64_t head, int64_t next) {
      attend<T, Dot>(args, part, head, next);
    });
    const int64_t end = offsets.back();
    fill_zero(args.out + end * heads * dim, (tokens - end) * heads * dim);
    for (int64_t head = 0; head < heads; ++head)
      fill_zero(args.lse + head * tokens + end, tokens - end);
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
}

}  // namespace neobert
