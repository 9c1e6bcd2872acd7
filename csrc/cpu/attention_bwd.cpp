// Attention over packed sequences, backward. The probabilities are recomputed from the log-sum-exp
// (Dao et al. 2022, algorithm 4). One piece of work is a range of keys of one sequence and head
// against all its queries, block by block. It owns dk and dv of its keys, and a float32 dq: all of
// it where the range is the whole sequence, otherwise one of a few partial sums that are added up
// afterwards in order. No atomics: the bits depend on the sequence alone.
#include "varlen.h"

namespace neobert {
namespace {

constexpr int64_t kBlock = 128;              // queries and keys of a block
constexpr int64_t kStride = kBlock + 16;     // of its scores: not a power of two, see L1 sets
constexpr int64_t kKeysPerPart = 1024, kMostParts = 4;

template <class T>
struct Backward {
  Rows<const T> dout, q, k, v, out;
  const float* lse;  // (heads, tokens)
  T* dqkv;           // (tokens, heads, 3, head_dim)
  int64_t tokens, heads, dim;
  int64_t columns;  // head_dim in whole vectors
  float scale;

  T* grad(int64_t token, int64_t head, int64_t which) const {
    return dqkv + ((token * heads + head) * 3 + which) * dim;
  }
};

// Per thread, for one block of queries against one block of keys.
template <class Value>
struct Scratch {
  Buffer<Value> k_columns, v_columns, k_steps, q_steps, dout_steps;
  Buffer<Value> p_pairs, ds_pairs, ds_rows;  // paired arithmetic only
  Buffer<float> scores, dp, dk, dv, dq, delta;
};

template <class T>
void dot_out_dout(const Backward<T>& args, const Part& part, int64_t head, float* delta) {
  for (int64_t i = 0; i < part.length; ++i) {
    const T* out = args.out.at(part.start + i, head);
    const T* dout = args.dout.at(part.start + i, head);
    Vec sum = zero();
    int64_t at = 0;
    for (; at + kWidth <= args.dim; at += kWidth) sum = fmadd(load(out + at), load(dout + at), sum);
    if (const int n = static_cast<int>(args.dim - at); n > 0)
      sum = fmadd(load(out + at, n), load(dout + at, n), sum);
    delta[i] = hsum(sum);
  }
}

// One row: q kᵀ and dp = dout vᵀ become p and ds = p (dp - delta), whose scale is still to come.
// Zero from `keys` up to a whole vector.
template <class Dot>
void probabilities(float* scores, float* dp, int64_t keys, float scale, float lse, float delta) {
  const Vec factor = set1(scale), shift = set1(lse), d = set1(delta);
  for (int64_t j = 0; j < keys; j += kWidth) {
    Vec p = Dot::exp(fmsub(load(scores + j), factor, shift));
    if (keys - j < kWidth) p = keep_first(p, static_cast<int>(keys - j), zero());
    store(scores + j, p);
    store(dp + j, p * (load(dp + j) - d));
  }
}

// The same where the row holds all keys. Then delta is the sum of p dp, whose rounding errors
// cancel against dp's where one key has nearly all the weight, and p sums to one however lse was
// rounded.
template <class Dot>
void all_probabilities(float* scores, float* dp, int64_t keys, float scale, float lse) {
  const Vec factor = set1(scale), shift = set1(lse);
  Vec sum = zero(), weighted = zero();
  for (int64_t j = 0; j < keys; j += kWidth) {
    Vec p = Dot::exp(fmsub(load(scores + j), factor, shift));
    if (keys - j < kWidth) p = keep_first(p, static_cast<int>(keys - j), zero());
    store(scores + j, p);
    sum = sum + p;
    weighted = fmadd(p, load(dp + j), weighted);
  }
  const float total = hsum(sum);
  const Vec inverse = set1(1.0f / total), delta = set1(hsum(weighted) / total);
  for (int64_t j = 0; j < keys; j += kWidth) {
    const Vec p = load(scores + j) * inverse;
    store(scores + j, p);
    store(dp + j, p * (load(dp + j) - delta));
  }
  // A single key has probability 1 whatever its score: rounding must not leave a gradient.
  if (keys == 1) dp[0] = 0.0f;
}

#if defined(__AVX512BF16__)
// Two rows of float32 to bfloat16, interleaved for products that sum over queries; `odd` is null
// below an odd last row.
void pair_rows(const float* even, const float* odd, int64_t keys, bf16* pairs) {
  for (int64_t j = 0; j < keys; j += kWidth) {
    const auto bits = [&](const float* row) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(row + j)));
    };
    const __m512i low = bits(even), high = odd == nullptr ? _mm512_setzero_si512() : bits(odd);
    _mm512_storeu_si512(pairs + 2 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
void narrow_row(const float* row, int64_t keys, bf16* to) {
  for (int64_t j = 0; j < keys; j += kWidth)
    store16(to + j, (__m256i)_mm512_cvtneps_pbh(load(row + j)));
}
#endif

template <class T, class Dot>
void differentiate(const Backward<T>& args, const Part& part, int64_t head, int64_t next_head,
                   float* partial_dq) {
  using Value = typename Dot::Value;
  constexpr int kDepth = Dot::kDepth;
  static thread_local Scratch<Value> scratch;

  const int64_t dim = args.dim, columns = args.columns, vecs = columns / kWidth;
  const int64_t steps = ceil_div(dim, kDepth), panel = kTileColumns * steps * kDepth;
  const int64_t start = part.start, panels = kBlock / kTileColumns * panel;
  const int64_t packed = kBlock * columns;
  Value* k_columns = scratch.k_columns.at_least(panels);
  Value* v_columns = scratch.v_columns.at_least(panels);
  Value* k_steps = scratch.k_steps.at_least(packed);
  Value* q_steps = scratch.q_steps.at_least(packed);
  Value* dout_steps = scratch.dout_steps.at_least(packed);
  float* scores = scratch.scores.at_least(kBlock * kStride);
  float* dp = scratch.dp.at_least(kBlock * kStride);
  float* dk = scratch.dk.at_least(kBlock * columns);
  float* dv = scratch.dv.at_least(kBlock * columns);
  const bool whole = partial_dq == nullptr;  // this part is the whole sequence
  float* dq = whole ? scratch.dq.at_least(part.length * columns) : partial_dq;
  const bool all_keys = part.length <= kBlock;  // fit one block
  float* delta = all_keys ? nullptr : scratch.delta.at_least(part.length);
  if (!all_keys) dot_out_dout(args, part, head, delta);

  const float* lse = args.lse + head * args.tokens + start;
  const Vec scale = set1(args.scale);
  const OperandB<Value> k_by_dim{k_columns, kTileColumns * kDepth, panel};
  const OperandB<Value> v_by_dim{v_columns, kTileColumns * kDepth, panel};
  const auto by_row = [&](const Value* p) {
    return OperandB<Value>{p, columns * kDepth, kTileColumns * kDepth};
  };

  for (int64_t k0 = part.begin; k0 < part.end; k0 += kBlock) {
    const int64_t keys = std::min(kBlock, part.end - k0), key_vecs = ceil_div(keys, kWidth);
    const bool first_keys = k0 == part.begin, last_keys = k0 + keys == part.end;
    const T* k = args.k.at(start + k0, head);
    pack_as_columns<Dot>(k, args.k.token_stride, keys, dim, k_columns);
    pack_as_columns<Dot>(args.v.at(start + k0, head), args.v.token_stride, keys, dim, v_columns);
    pack_as_steps<Dot>(k, args.k.token_stride, keys, dim, columns, k_steps);

    for (int64_t q0 = 0; q0 < part.length; q0 += kBlock) {
      const int64_t queries = std::min(kBlock, part.length - q0);
      const bool first_queries = q0 == 0, last_queries = q0 + queries == part.length;
      const Rows<const T> q{args.q.at(start + q0, head), args.q.token_stride, 0};
      const Rows<const T> dout{args.dout.at(start + q0, head), args.dout.token_stride, 0};
      pack_as_steps<Dot>(q.data, q.token_stride, queries, dim, columns, q_steps);
      pack_as_steps<Dot>(dout.data, dout.token_stride, queries, dim, columns, dout_steps);

      // A few queries against the block of keys: p, ds, and their dq.
      for (int64_t row = 0; row < queries; row += kTileRows) {
        const int count = static_cast<int>(std::min<int64_t>(kTileRows, queries - row));
        if (last_keys && next_head >= 0)
          for (int i = 0; i < count; ++i)
            for (const auto* rows : {&args.q, &args.k, &args.v, &args.dout})
              prefetch_row(rows->at(start + q0 + row + i, next_head), dim);
        float* s_rows = scores + row * kStride;
        float* dp_rows = dp + row * kStride;
        OperandA<Value> q_rows{nullptr, columns, 1}, dout_rows{nullptr, columns, 1}, ds_rows;
        if constexpr (kDepth == 1) {
          q_rows.data = q_steps + row * columns;
          dout_rows.data = dout_steps + row * columns;
        } else {
          q_rows = {q.at(row, 0), q.token_stride, kDepth};
          dout_rows = {dout.at(row, 0), dout.token_stride, kDepth};
        }
        multiply<Dot>(count, key_vecs, q_rows, k_by_dim, steps,
                      [&](int i, int64_t v, Vec s) {
                        store(s_rows + i * kStride + v * kWidth, s);
                      });
        multiply<Dot>(
            count, key_vecs, dout_rows, v_by_dim, steps,
            [&](int i, int64_t v, Vec s) { store(dp_rows + i * kStride + v * kWidth, s); });
        for (int i = 0; i < count; ++i) {
          float *s_row = s_rows + i * kStride, *dp_row = dp_rows + i * kStride;
          const int64_t query = q0 + row + i;
          if (all_keys) {
            all_probabilities<Dot>(s_row, dp_row, keys, args.scale, lse[query]);
          } else {
            probabilities<Dot>(s_row, dp_row, keys, args.scale, lse[query], delta[query]);
          }
        }
        if constexpr (kDepth == 1) {
          ds_rows = {dp_rows, kStride, 1};
        } else {
#if defined(__AVX512BF16__)
          bf16* p_pairs = scratch.p_pairs.at_least(kBlock * kStride);
          bf16* ds_pairs = scratch.ds_pairs.at_least(kBlock * kStride);
          bf16* narrow = scratch.ds_rows.at_least(kTileRows * kStride);
          for (int i = 0; i < count; i += 2) {
            const auto pair = [&](const float* even, bf16* pairs) {
              pair_rows(even, i + 1 < count ? even + kStride : nullptr, keys,
                        pairs + (row + i) * kStride);
            };
            pair(s_rows + i * kStride, p_pairs);
            pair(dp_rows + i * kStride, ds_pairs);
          }
          for (int i = 0; i < count; ++i)
            narrow_row(dp_rows + i * kStride, keys, narrow + i * kStride);
          ds_rows = {narrow, kStride, kDepth};
#endif
        }
        float* dq_rows = dq + (q0 + row) * columns;
        multiply<Dot>(
            count, vecs, ds_rows, by_row(k_steps), ceil_div(keys, kDepth),
            [&](int i, int64_t v, Vec sum) {
              float* so_far = dq_rows + i * columns + v * kWidth;
              if (!first_keys) sum = load(so_far) + sum;
              if (whole && last_keys) {
                store_vec(args.grad(start + q0 + row + i, head, 0), v, dim, sum * scale);
              } else {
                store(so_far, sum);
              }
            });
      }

      // The block's terms of dv = pᵀ dout and dk = dsᵀ q. A query is a step, a key a row of A.
      const Value *p_t, *ds_t;
      if constexpr (kDepth == 1) {
        p_t = scores, ds_t = dp;
      } else {
        p_t = scratch.p_pairs.at_least(0), ds_t = scratch.ds_pairs.at_least(0);
      }
      const auto add = [&](const Value* a, const Value* b, float* sums, int64_t which, Vec factor) {
        for (int64_t key = 0; key < keys; key += kTileRows) {
          const int count = static_cast<int>(std::min<int64_t>(kTileRows, keys - key));
          multiply<Dot>(
              count, vecs, OperandA<Value>{a + key * kDepth, kDepth, kStride * kDepth}, by_row(b),
              ceil_div(queries, kDepth),
              [&](int i, int64_t v, Vec sum) {
                float* so_far = sums + (key + i) * columns + v * kWidth;
                if (!first_queries) sum = load(so_far) + sum;
                if (last_queries) {
                  store_vec(args.grad(start + k0 + key + i, head, which), v, dim, sum * factor);
                } else {
                  store(so_far, sum);
                }
              });
        }
      };
      add(ds_t, q_steps, dk, 1, scale);
      add(p_t, dout_steps, dv, 2, set1(1.0f));
    }
  }
}

// A sequence whose keys are split: its partial sums of dq, (parts, heads, length, columns).
struct Split {
  int64_t start, length, parts, partial;
};

template <class T>
void add_partial_dq(const Backward<T>& args, const Split& split, const float* partial_dq) {
  const int64_t rows = args.heads * split.length;
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = partial_dq + split.partial + row * args.columns;
      T* to = args.grad(split.start + row % split.length, row / split.length, 0);
      for (int64_t v = 0; v < args.columns / kWidth; ++v) {
        Vec sum = load(from + v * kWidth);
        for (int64_t part = 1; part < split.parts; ++part)
          sum = sum + load(from + part * rows * args.columns + v * kWidth);
        store_vec(to, v, args.dim, sum * set1(args.scale));
      }
    }
  });
}

Tensor varlen_attention_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                            const Tensor& out, const Tensor& lse_, const Tensor& cu_seqlens,
                            int64_t max_seqlen, double scale) {
  constexpr const char* kOp = "varlen_attention_bwd";
  check_rows(kOp, "q", q, q);
  check_rows(kOp, "dout", dout, q);
  check_rows(kOp, "k", k, q);
  check_rows(kOp, "v", v, q);
  check_rows(kOp, "out", out, q);
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  require(lse_.is_cpu() && lse_.scalar_type() == ScalarType::Float && lse_.dim() == 2 &&
              lse_.size(0) == heads && lse_.size(1) == tokens,
          kOp, "lse must be float32 (", heads, ", ", tokens, "), as the forward returns");
  const Tensor lse = as_contiguous(lse_);
  const std::vector<int64_t> offsets = checked_offsets(kOp, cu_seqlens, max_seqlen, tokens);
  Tensor dqkv = empty_cpu({tokens, heads, 3, dim}, q.scalar_type());
  if (q.numel() == 0) return dqkv;

  const int64_t columns = round_up(dim, kWidth);
  std::vector<Part> parts;
  std::vector<Split> splits;
  int64_t partial = 0;
  for (size_t i = 1; i < offsets.size(); ++i) {
    const int64_t start = offsets[i - 1], length = offsets[i] - start;
    if (length == 0) continue;
    const int64_t wanted = std::min(kMostParts, ceil_div(length, kKeysPerPart));
    const int64_t keys = round_up(ceil_div(length, wanted), kBlock), count = ceil_div(length, keys);
    if (count > 1) splits.push_back({start, length, count, partial});
    for (int64_t begin = 0; begin < length; begin += keys) {
      const int64_t end = std::min(length, begin + keys);
      parts.push_back({start, length, begin, end, count > 1 ? partial : Part::kNoPartial});
      if (count > 1) partial += heads * length * columns;
    }
  }
  const Tensor partial_dq = empty_cpu({partial}, ScalarType::Float);

  dispatch_dot(kOp, q, [&](auto* type, auto* dot) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Dot = std::remove_pointer_t<decltype(dot)>;
    const Backward<T> args{rows_of<T>(dout), rows_of<T>(q), rows_of<T>(k), rows_of<T>(v),
                           rows_of<T>(out), data<float>(lse), data<T>(dqkv), tokens, heads, dim,
                           columns, static_cast<float>(scale)};
    for_each_part(parts, heads, 10 * dim, [&](const Part& part, int64_t head, int64_t next) {
      float* dq = part.partial == Part::kNoPartial
                      ? nullptr
                      : data<float>(partial_dq) + part.partial + head * part.length * columns;
      differentiate<T, Dot>(args, part, head, next, dq);
    });
    for (const Split& split : splits) add_partial_dq(args, split, data<float>(partial_dq));
    const int64_t end = offsets.back();
    fill_zero(data<T>(dqkv) + end * heads * 3 * dim, (tokens - end) * heads * 3 * dim);
  });
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(neobert, CPU, m) {
  m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd));
}

}  // namespace neobert
