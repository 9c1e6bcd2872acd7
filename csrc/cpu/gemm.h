// y = x @ weight.T in tiles of kRows x kCols elements held in registers.
//
// The weight is read in panels of kCols of its rows, transposed to [in_features][kCols] once and
// then used for many rows of x. Either operand may be a transposed matrix, as in the products of the
// backward pass, dy @ weight and dy.T @ x: it is then packed the other way.
//
// An output element is summed over k in one order whatever the tile it falls in: one chain of fused
// multiply-adds for each kBlock of k, and the blocks' sums added in order. So its bits depend on
// nothing but its own row of x and its own row of weight: not on the batch, not on the threads. The
// blocks also keep the rounding error of long sums down.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace neobert::gemm {

constexpr int kCols = 2 * kWidth;
#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 accumulators, 2 vectors of the panel, a broadcast: 31 of 32 registers
#else
constexpr int kRows = 6;  // 12 + 2 + 1 of 16
#endif
constexpr int64_t kBlock = 192;  // in lanes, see below; a multiple of 16

// A matrix of which one axis is contiguous: elements apart in memory, between rows and along k.
template <class X>
struct Matrix {
  const X* data;
  int64_t row, k;
  const X* at(int64_t i, int64_t element) const { return data + i * row + element * k; }
  bool transposed() const { return k != 1; }
};

// What one 32-bit lane holds: a float32, or where the CPU multiplies them, two bfloat16 that are
// neighbours in k. load_lanes takes the lanes of one row, load_across one lane of several rows that
// are neighbours in memory, `step` from one k to the next, of which `elements` are left.
struct Float32 {
  static constexpr int kPerLane = 1;
  template <class X>
  static Vec load_lanes(const X* x) {
    return load(x);
  }
  template <class X>
  static Vec load_lanes(const X* x, int64_t elements) {
    return load(x, static_cast<int>(elements));
  }
  template <class X>
  static Vec load_across(const X* x, int64_t, int rows, int64_t) {
    return rows == kWidth ? load(x) : load(x, rows);
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return fmadd(a, b, c); }
};

#if defined(__AVX512BF16__)
// Products and sums in float32; the instruction takes denormals for zero, in and out.
struct BFloat16Pair {
  static constexpr int kPerLane = 2;
  static Vec load_lanes(const bf16* x) { return _mm512_castsi512_ps(_mm512_loadu_si512(x)); }
  static Vec load_lanes(const bf16* x, int64_t elements) {
    const auto mask = static_cast<__mmask32>((1u << elements) - 1u);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x));
  }
  static Vec load_across(const bf16* x, int64_t step, int rows, int64_t elements) {
    const __m512i even = _mm512_cvtepu16_epi32(load16(x, rows));
    if (elements == 1) return _mm512_castsi512_ps(even);
    const __m512i odd = _mm512_cvtepu16_epi32(load16(x + step, rows));
    return _mm512_castsi512_ps(_mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Lane>
int64_t lanes_of(int64_t elements) {
  return (elements + Lane::kPerLane - 1) / Lane::kPerLane;
}

// kWidth lanes from `at` of a row of `elements`, zeros past its end.
template <class Lane, class X>
Vec load_row(const X* row, int64_t at, int64_t elements) {
  const int64_t left = elements - at;
  return left >= kWidth * Lane::kPerLane ? Lane::load_lanes(row + at)
                                         : Lane::load_lanes(row + at, left);
}

// Transposes a kWidth x kWidth block of lanes in registers.
#if defined(__AVX512F__)
inline void transpose(Vec (&v)[16]) {
  Vec t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  // Columns c, c+4, c+8, c+12 of rows 4g…4g+3 in the four 128-bit quarters of v[4g + c].
  for (int i = 0; i < 16; i += 4)
    for (int h = 0; h < 2; ++h) {
      v[i + 2 * h] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      v[i + 2 * h + 1] = _mm512_shuffle_ps(t[i + h], t[i + 2 + h], 0xEE);
    }
  for (int c = 0; c < 4; ++c) {
    const Vec a = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88);
    const Vec b = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xDD);
    const Vec d = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88);
    const Vec e = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xDD);
    t[c] = _mm512_shuffle_f32x4(a, d, 0x88);
    t[4 + c] = _mm512_shuffle_f32x4(b, e, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, d, 0xDD);
    t[12 + c] = _mm512_shuffle_f32x4(b, e, 0xDD);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}
#else
inline void transpose(Vec (&v)[8]) {
  Vec t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int h = 0; h < 2; ++h) {
      v[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      v[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xEE);
    }
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(v[c], v[4 + c], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}
#endif

// The lanes of up to kWidth rows from `element` on, rows past `rows` zero: v[i] is row i, kWidth of
// its lanes, or of a transposed matrix lane i of kWidth rows.
template <class Lane, class X>
void load_square(Matrix<X> m, int64_t row, int rows, int64_t element, int64_t end,
                 Vec (&v)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    if (m.transposed()) {
      const int64_t k = element + i * Lane::kPerLane;
      v[i] = k < end ? Lane::load_across(m.at(row, k), m.k, rows, end - k) : zero();
    } else {
      v[i] = i < rows ? load_row<Lane>(m.at(row + i, 0), element, end) : zero();
    }
  }
}

// Writes elements begin … end of `rows` <= kWidth rows of weight as columns of a panel; the
// columns past them are zeros.
template <class Lane, class X>
void pack(Matrix<X> weight, int64_t row, int rows, int64_t begin, int64_t end, float* panel) {
  constexpr int64_t kElements = kWidth * Lane::kPerLane;
  // Whole squares without a test per row: the fewer instructions, the more cache misses of the rows
  // to come are under way at a time.
  if (rows == kWidth && !weight.transposed())
    for (; begin + kElements <= end; begin += kElements) {
      const X* const from = weight.at(row, begin);
      Vec v[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) v[i] = Lane::load_lanes(from + i * weight.row);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i, panel += kCols) store(panel, v[i]);
    }
  for (int64_t at = begin; at < end; at += kElements) {
    Vec v[kWidth];
    load_square<Lane>(weight, row, rows, at, end, v);
    if (!weight.transposed()) transpose(v);
    const int64_t lanes = std::min<int64_t>(kWidth, lanes_of<Lane>(end - at));
    for (int64_t k = 0; k < lanes; ++k, panel += kCols) store(panel, v[k]);
  }
}

// Copies kBlock lanes (fewer at the end) of `rows` rows of x next to one another, in the kernel's
// element type. Rows of 2048 floats would lie on top of one another in the first-level cache.
constexpr int64_t kBlockStride = kBlock + kWidth;

template <class Lane, class X>
void copy_block(Matrix<X> x, int64_t row, int64_t rows, int64_t begin, int64_t end, float* block) {
  constexpr int64_t kElements = kWidth * Lane::kPerLane;
  if (x.transposed()) {
    for (int64_t at = begin; at < end; at += kElements, block += kWidth)
      for (int64_t r = 0; r < rows; r += kWidth) {
        const int count = static_cast<int>(std::min<int64_t>(kWidth, rows - r));
        Vec v[kWidth];
        load_square<Lane>(x, row + r, count, at, end, v);
        transpose(v);
        for (int64_t i = 0; i < count; ++i) store(block + (r + i) * kBlockStride, v[i]);
      }
  } else {
    for (int64_t r = 0; r < rows; ++r, block += kBlockStride)
      for (int64_t at = begin; at < end; at += kElements)
        store(block + (at - begin) / Lane::kPerLane, load_row<Lane>(x.at(row + r, 0), at, end));
  }
}

// Memory to bring into the second-level cache while the arithmetic units are busy: `count` times
// `bytes` at one place, and at a second where there is one, each time `step` bytes further.
struct Ahead {
  static constexpr int64_t kPieces = 16;  // fetched per block: enough for kRows
  static constexpr int64_t kLanes = kBlock / kPieces;
  static constexpr int64_t kPiece = kBlock * sizeof(float);  // a row of a block
  const char* at = nullptr;
  int64_t step = 0;
  int64_t count = 0;
  int64_t bytes = kPiece;
  const char* second = nullptr;

  void fetch() {
    if (count <= 0) return;
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
    if (second != nullptr)
      for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(second + i, _MM_HINT_T1);
    skip(1);
  }
  void skip(int64_t pieces) {
    at += pieces * step;
    if (second != nullptr) second += pieces * step;
    count -= pieces;
  }
};

// tile[r][c] (+)= sum over k of block[r][k] * panel[k][c]; sets it where `first`.
template <class Lane, int kTileRows>
void multiply_tile(const float* block, int64_t lanes, const float* panel, bool first, float* tile,
                   Ahead ahead) {
  constexpr int kPanelAhead = 4;  // the hardware follows the panel too late by itself
  Vec acc[kTileRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) acc[r][0] = acc[r][1] = zero();
  for (const float* const end = block + lanes; block < end;) {
    ahead.fetch();
    for (const float* const stop = std::min(end, block + Ahead::kLanes); block < stop; ++block) {
      _mm_prefetch(panel + kPanelAhead * kCols, _MM_HINT_T0);
      if constexpr (kCols * sizeof(float) > 64)
        _mm_prefetch(panel + kPanelAhead * kCols + kWidth, _MM_HINT_T0);
      const Vec b0 = load(panel), b1 = load(panel + kWidth);
      panel += kCols;
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const Vec a = set1(block[r * kBlockStride]);
        acc[r][0] = Lane::multiply_add(a, b0, acc[r][0]);
        acc[r][1] = Lane::multiply_add(a, b1, acc[r][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      float* at = tile + r * kCols + h * kWidth;
      store(at, first ? acc[r][h] : load(at) + acc[r][h]);
    }
}

using TileFn = void (*)(const float*, int64_t, const float*, bool, float*, Ahead);

template <class Lane, int... kRowsLess1>
constexpr std::array<TileFn, kRows> tile_functions(std::integer_sequence<int, kRowsLess1...>) {
  return {multiply_tile<Lane, kRowsLess1 + 1>...};
}

// multiply_tile for 1, 2, …, kRows rows.
template <class Lane>
constexpr std::array<TileFn, kRows> kTileFns =
    tile_functions<Lane>(std::make_integer_sequence<int, kRows>());

}  // namespace neobert::gemm
