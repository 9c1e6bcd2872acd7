// The matrix products of attention: register-blocked tiles over packed operands.
//
// Every product of the forward and backward pass, q kᵀ, p v, dout vᵀ, ds k, pᵀ dout and dsᵀ q, is
// C[i][j] = sum_k A[i][k] B[k][j] with few rows at a time: A is broadcast from wherever it lies
// (any row and step stride, so a transposed A costs nothing), B is read in whole vectors, and a
// tile of C stays in registers. An element of C is summed in the order of k whatever tile it falls
// in: its bits depend on its own row and column only.
#pragma once

#include <type_traits>

#include "simd.h"

namespace neobert {

constexpr int kTileRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;
constexpr int kTileColumns = kTileVecs * kWidth;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr float kLog2E = 1.44269504088896341f;

inline Vec fmsub(Vec a, Vec b, Vec c) { return fmadd(a, b, zero() - c); }

// 2^x = 2^floor(x) * 2^r: a minimax polynomial in r on [0, 1) that is exact at 0, to 1 ulp with
// degree 6. 0 below -126; infinities and NaN as they should be.
template <int kDegree>
inline Vec exp2(Vec x) {
  static_assert(kDegree == 4 || kDegree == 6);
#if defined(__AVX512F__)
  const Vec r = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
#else
  const Vec clamped = vmax(set1(-126.0f), x);  // this order lets NaN through
  const Vec whole = _mm256_floor_ps(vmin(set1(128.0f), clamped));
  const Vec r = clamped - whole;
#endif
  Vec p;
  if constexpr (kDegree == 6) {
    p = set1(2.1612914861e-04f);
    p = fmadd(p, r, set1(1.2467846973e-03f));
    p = fmadd(p, r, set1(9.6754515544e-03f));
    p = fmadd(p, r, set1(5.5485282093e-02f));
    p = fmadd(p, r, set1(2.4022930861e-01f));
    p = fmadd(p, r, set1(6.9314706326e-01f));
  } else {
    p = set1(1.3426684774e-02f);
    p = fmadd(p, r, set1(5.2242472768e-02f));
    p = fmadd(p, r, set1(2.4128019810e-01f));
    p = fmadd(p, r, set1(6.9304484129e-01f));
  }
  p = fmadd(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
#else
  const Vec vanishes = _mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ);
  return _mm256_andnot_ps(vanishes, p * pow2_of(_mm256_cvtps_epi32(whole)));
#endif
}

// A Dot is the arithmetic of one step: 4 bytes of A against a vector of 4-byte elements of B, that
// is kDepth consecutive values along the summed axis. Sums are made of chains of kChain steps: with
// 32 in place of one long chain float32 rounds less, at a cost too small to measure; bfloat16
// operands are rounded far more coarsely than any chain.
struct Float32Dot {
  using Value = float;
  static constexpr int kDepth = 1;
  static constexpr int kExpDegree = 6;
  static constexpr int64_t kChain = 32;
  static Vec exp(Vec x) { return neobert::exp(x); }
  static Vec step(Vec a, Vec b, Vec c) { return fmadd(a, b, c); }
};

#if defined(__AVX512BF16__)
struct PairedBf16Dot {
  using Value = bf16;
  static constexpr int kDepth = 2;
  static constexpr int kExpDegree = 4;  // 3e-6, where rounding the result to bfloat16 costs 2e-3
  static constexpr int64_t kChain = 1024;
  static Vec exp(Vec x) { return exp2<kExpDegree>(x * set1(kLog2E)); }
  static Vec step(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};
#endif

// Strides in Values. A: between rows, and between steps. B: between steps, and between the
// kTileColumns-wide panels of columns.
template <class Value>
struct OperandA {
  const Value* data;
  int64_t row, step;
};
template <class Value>
struct OperandB {
  const Value* data;
  int64_t step, panel;
};

template <class Value>
inline Vec broadcast_step(const Value* p) {
  float bits;
  std::memcpy(&bits, p, sizeof(bits));
  return set1(bits);
}

inline Vec load_bits(const void* p) {
#if defined(__AVX512F__)
  return _mm512_loadu_ps(p);
#else
  return _mm256_loadu_ps(static_cast<const float*>(p));
#endif
}

// The first n lanes of v, the others from `rest`.
inline Vec keep_first(Vec v, int n, Vec rest) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(rest, mask_of(n), v);
#else
  return _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(mask_of(n)));
#endif
}

template <class Dot, int kRows, int kVecs, class Finish>
inline void tile(OperandA<typename Dot::Value> a, const typename Dot::Value* b, int64_t b_step,
                 int64_t steps, int64_t first_vec, const Finish& finish) {
  alignas(64) float sums[kRows][kVecs][kWidth];
  Vec c[kRows][kVecs];
  const typename Dot::Value* a_at = a.data;
  for (int64_t from = 0;; from += Dot::kChain) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) c[i][j] = zero();
    const int64_t chain = steps - from < Dot::kChain ? steps - from : Dot::kChain;
    for (int64_t k = 0; k < chain; ++k) {
      Vec bs[kVecs];
      for (int j = 0; j < kVecs; ++j) bs[j] = load_bits(b + j * kWidth * Dot::kDepth);
      for (int i = 0; i < kRows; ++i) {
        const Vec as = broadcast_step(a_at + i * a.row);
        for (int j = 0; j < kVecs; ++j) c[i][j] = Dot::step(as, bs[j], c[i][j]);
      }
      a_at += a.step;
      b += b_step;
    }
    if (from > 0)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVecs; ++j) c[i][j] = load(sums[i][j]) + c[i][j];
    if (from + Dot::kChain >= steps) break;
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVecs; ++j) store(sums[i][j], c[i][j]);
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) finish(i, first_vec + j, c[i][j]);
}

// Calls f with std::integral_constant n, for n in 1..kMax.
template <int kMax, class F>
inline void with_constant(int n, const F& f) {
  if constexpr (kMax > 1)
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  f(std::integral_constant<int, kMax>{});
}

// A B, `rows` <= kTileRows high and `vecs` vectors wide: finish(row, vec, sum) for each vector.
template <class Dot, class Finish>
inline void multiply(int rows, int64_t vecs, OperandA<typename Dot::Value> a,
                     OperandB<typename Dot::Value> b, int64_t steps, const Finish& finish) {
  with_constant<kTileRows>(rows, [&](auto row_count) {
    for (int64_t v = 0; v < vecs; v += kTileVecs) {
      const int n = static_cast<int>(vecs - v < kTileVecs ? vecs - v : kTileVecs);
      const auto* panel = b.data + v / kTileVecs * b.panel;
      with_constant<kTileVecs>(n, [&](auto vec_count) {
        tile<Dot, row_count(), vec_count()>(a, panel, b.step, steps, v, finish);
      });
    }
  });
}

#if defined(__AVX512F__)
inline void transpose(Vec (&r)[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  // Now r[4g + k] holds, in 128-bit lane l, column 4l + k of rows 4g to 4g + 3.
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    const Vec a = _mm512_shuffle_f32x4(r[k], r[k + 4], 0x88);
    const Vec b = _mm512_shuffle_f32x4(r[k], r[k + 4], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0x88);
    const Vec d = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0xdd);
    t[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[k + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[k + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}
#else
inline void transpose(Vec (&r)[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int k = 0; k < 4; ++k) {
    t[k] = _mm256_permute2f128_ps(r[k], r[k + 4], 0x20);
    t[k + 4] = _mm256_permute2f128_ps(r[k], r[k + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// Up to kWidth steps of one row, the rest zero.
template <class Dot, class T>
inline Vec load_steps(const T* p, int64_t values) {
  if constexpr (Dot::kDepth == 1) {
    return values >= kWidth ? load(p) : load(p, static_cast<int>(values));
  } else {
#if defined(__AVX512BF16__)
    if (values >= 2 * kWidth) return load_bits(p);
    const __mmask32 mask = (1u << values) - 1u;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
#endif
  }
}

// Packs rows of `source` as the columns of a B operand: panel, then step, then column. Columns are
// padded with zeros to whole vectors. Panels lie ceil(dim / kDepth) * kDepth * kTileColumns apart.
template <class Dot, class T>
void pack_as_columns(const T* source, int64_t stride, int64_t rows, int64_t dim,
                     typename Dot::Value* packed) {
  constexpr int kChunk = kWidth * Dot::kDepth;
  const int64_t step = kTileColumns * Dot::kDepth, steps = ceil_div(dim, Dot::kDepth);
  for (int64_t row = 0; row < rows; row += kWidth) {
    auto* to = packed + row / kTileColumns * steps * step + row % kTileColumns * Dot::kDepth;
    const int n = static_cast<int>(rows - row < kWidth ? rows - row : kWidth);
    for (int64_t at = 0; at < dim; at += kChunk) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] =
            i < n ? load_steps<Dot>(source + (row + i) * stride + at, dim - at) : zero();
      transpose(block);
      const int64_t first = at / Dot::kDepth;
      const int64_t count = steps - first < kWidth ? steps - first : kWidth;
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + (first + i) * step, &block[i], sizeof(Vec));
    }
  }
}

// Packs rows of `source` as the steps of a B operand, kDepth rows to a step, each row padded with
// zeros to `columns`. An odd last row is paired with zeros.
template <class Dot, class T>
void pack_as_steps(const T* source, int64_t stride, int64_t rows, int64_t dim, int64_t columns,
                   typename Dot::Value* packed) {
  for (int64_t row = 0; row < rows; row += Dot::kDepth) {
    const T* from = source + row * stride;
    auto* to = packed + row * columns;
    for (int64_t at = 0; at < columns; at += kWidth) {
      const int n = static_cast<int>(dim - at < kWidth ? dim - at : kWidth);
      if constexpr (Dot::kDepth == 1) {
        store(to + at, n == kWidth ? load(from + at) : load(from + at, n));
      } else {
#if defined(__AVX512BF16__)
        const __m512i even = _mm512_cvtepu16_epi32(load16(from + at, n));
        const __m512i odd = row + 1 < rows ? _mm512_cvtepu16_epi32(load16(from + stride + at, n))
                                           : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 2 * at, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
#endif
      }
    }
  }
}

}  // namespace neobert
