// What the forward and backward pass of attention share: strided operands, the offsets and their
// checks, and the division of ragged batches into work.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernel.h"
#include "micro_gemm.h"

namespace neobert {

// A (tokens, heads, head_dim) tensor with a contiguous last axis.
template <class T>
struct Rows {
  T* data;
  int64_t token_stride, head_stride;
  T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

template <class T>
Rows<const T> rows_of(const Tensor& t) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

// Calls f(T*, Dot*) with null pointers: the element type of `t`, and the arithmetic that serves it
// on this instruction set. Pairs of an odd head_dim do not come out even.
template <class F>
void dispatch_dot(const char* op, const Tensor& t, F&& f) {
  dispatch(op, "q", t, [&](auto* type) {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<decltype(type), bf16*>)
      if (t.size(2) % PairedBf16Dot::kDepth == 0)
        return f(type, static_cast<PairedBf16Dot*>(nullptr));
#endif
    f(type, static_cast<Float32Dot*>(nullptr));
  });
}

inline void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  require(t.is_cpu(), op, name, " must be on the CPU, as q is");
  require(t.dim() == 3 && q.dim() == 3, op, name,
          " must have shape (tokens, heads, head_dim), got ", t.dim(), " axes");
  require(same_shape(t, q), op, name, " must have q's shape (", q.size(0), ", ", q.size(1), ", ",
          q.size(2), "), got (", t.size(0), ", ", t.size(1), ", ", t.size(2), ")");
  require(t.scalar_type() == q.scalar_type(), op, name, " must have q's dtype");
  require(t.size(2) <= 1 || t.stride(2) == 1, op, name,
          " must have a contiguous last axis, got stride ", t.stride(2));
}

// The offsets, after checking all of them: nothing downstream reads or writes out of bounds.
inline std::vector<int64_t> checked_offsets(const char* op, const Tensor& cu_seqlens_,
                                            int64_t max_seqlen, int64_t tokens) {
  require(cu_seqlens_.is_cpu(), op, "cu_seqlens must be on the CPU, as q is");
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_);
  check_cu_seqlens(op, cu_seqlens, tokens);
  const int32_t* values = data<int32_t>(cu_seqlens);
  const std::vector<int64_t> offsets(values, values + cu_seqlens.size(0));
  for (size_t i = 1; i < offsets.size(); ++i)
    require(offsets[i] - offsets[i - 1] <= max_seqlen, op, "cu_seqlens gives sequence ", i - 1, " ",
            offsets[i] - offsets[i - 1], " tokens, but max_seqlen is ", max_seqlen);
  return offsets;
}

// A part of one sequence, as one piece of work per head: some of its rows against all of them.
struct Part {
  static constexpr int64_t kNoPartial = -1;
  int64_t start, length;         // the sequence: first token, tokens
  int64_t begin, end;            // the rows of the part, relative to start
  int64_t partial = kNoPartial;  // where its partial result lies, if others must be added to it
};

// Calls f(part, head, next) for every part and head; `next` is the head of the same part that the
// same thread takes next, or -1. Threads pull pieces off a counter, the largest first; a piece is
// several heads of a part where that leaves pieces enough to balance. Which thread computes what
// has no effect on any bit. `flops_per_pair` is the cost of one query against one key.
template <class F>
void for_each_part(std::vector<Part>& parts, int64_t heads, int64_t flops_per_pair, const F& f) {
  const auto cost = [](const Part& p) { return (p.end - p.begin) * p.length; };
  std::stable_sort(parts.begin(), parts.end(),
                   [&](const Part& a, const Part& b) { return cost(a) > cost(b); });
  double total = 0;
  for (const Part& p : parts) total += static_cast<double>(cost(p)) * heads;
  // Small work is not worth the hand-over to many threads.
  const int64_t worthwhile = 1 + static_cast<int64_t>(total * flops_per_pair / 1e6);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worthwhile);
  const double share = total / (32.0 * threads);

  struct Piece {
    const Part* part;
    int64_t head, end;
  };
  std::vector<Piece> pieces;
  for (const Part& p : parts) {
    const int64_t together = std::clamp<int64_t>(share / cost(p), 1, heads);
    for (int64_t head = 0; head < heads; head += together)
      pieces.push_back({&p, head, std::min(heads, head + together)});
  }
  std::atomic<size_t> counter{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = counter++; i < pieces.size(); i = counter++) {
      const Piece& piece = pieces[i];
      for (int64_t head = piece.head; head < piece.end; ++head)
        f(*piece.part, head, head + 1 < piece.end ? head + 1 : -1);
    }
  });
}

// Rows of one head lie far apart, a few cache lines in each page: the hardware sees no stream.
template <class T>
inline void prefetch_row(const T* row, int64_t dim) {
  const char* from = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < dim * static_cast<int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(from + at);
}

// Memory of one thread that outlives the call: at most a few MiB, and growing it anew in every call
// would cost page faults in every call.
template <class T>
class Buffer {
 public:
  T* at_least(int64_t count) {
    if (count > count_) {
      const size_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), 64);
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      count_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t count_ = 0;
};

template <class T>
void fill_zero(T* from, int64_t count) {
  std::memset(static_cast<void*>(from), 0, static_cast<size_t>(count) * sizeof(T));
}

// Stores vector `vec` of a row of `dim` elements; the last one may be partial.
template <class T>
inline void store_vec(T* row, int64_t vec, int64_t dim, Vec value) {
  const int64_t at = vec * kWidth;
  dim - at >= kWidth ? store(row + at, value) : store(row + at, value, static_cast<int>(dim - at));
}

}  // namespace neobert
