// Two vectors at a time, for the kernels that read and write whole rows.
//
// A register holds 2 * kWidth bfloat16 numbers: those of even index in the low halves of its 32-bit
// lanes, those of odd index in the high halves. One shift makes a vector of floats of the former and
// one mask of the latter, where the elements in their order take two operations a vector to widen,
// and more to narrow. So a pair of bfloat16 vectors holds the elements of even and those of odd
// index, and what meets it, such as the weight of a norm, must come in that order. float32 and
// float16 come as they lie in memory, and so does bfloat16 that meets them.
#pragma once

#include "simd.h"

namespace neobert {

struct Pair {
  Vec a, b;
};
constexpr int kPair = 2 * kWidth;

inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
inline Pair operator*(Pair x, Vec y) { return {x.a * y, x.b * y}; }
inline Pair fmadd(Pair x, Pair y, Pair z) { return {fmadd(x.a, y.a, z.a), fmadd(x.b, y.b, z.b)}; }
inline Pair fnmadd(Pair x, Vec y, Pair z) { return {fnmadd(x.a, y, z.a), fnmadd(x.b, y, z.b)}; }
inline float hsum(Pair x) { return hsum(x.a + x.b); }

// Whether rows of these types, which meet in one kernel, come as even and odd elements.
template <class... T>
constexpr bool kSplits = (std::is_same_v<T, bf16> && ...);

// Where element i of a row lies once the row is in the order of its pairs.
template <bool kSplit>
int64_t place(int64_t i) {
  if constexpr (!kSplit) return i;
  const int64_t within = i % kPair;
  return i - within + within % 2 * kWidth + within / 2;
}

// One register of 2 * kWidth 16-bit numbers as they lie in memory, and the pair that it holds.
#if defined(__AVX512F__)

inline __m512i load_packed(const void* p, Whole) { return _mm512_loadu_si512(p); }
inline __m512i load_packed(const void* p, Lanes lanes) {
  return _mm512_maskz_loadu_epi16((1u << lanes.n) - 1u, p);
}
inline void store_packed(void* p, __m512i v, Whole) { _mm512_storeu_si512(p, v); }
inline void store_packed(void* p, __m512i v, Lanes lanes) {
  _mm512_mask_storeu_epi16(p, (1u << lanes.n) - 1u, v);
}
inline void stream_packed(void* p, __m512i v) { _mm512_stream_si512(static_cast<__m512i*>(p), v); }
inline __m256i first_half(__m512i v) { return _mm512_castsi512_si256(v); }
inline __m256i second_half(__m512i v) { return _mm512_extracti64x4_epi64(v, 1); }
inline __m512i join(__m256i a, __m256i b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

inline Pair split_bf16(__m512i v) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(v, high))};
}
template <bool kSplit>
inline __m512i to_bf16(Pair v) {
#if defined(__AVX512BF16__)
  __m512i bits = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v.b, v.a));
  if constexpr (kSplit) {
    alignas(64) static constexpr int16_t kInterleaved[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    bits = _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), bits);
  }
  // As in to_bf16(Vec) the instruction takes denormal numbers for zero; but where nothing came out
  // zero, none went in, and that is one test for both vectors.
  if (_mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x7fff)) == ~__mmask32{0}) [[likely]]
    return bits;
  if ((is_denormal(v.a) | is_denormal(v.b)) == 0) return bits;
#endif
  const __m512i a = _mm512_srli_epi32(round_to_bf16(v.a), 16), b = round_to_bf16(v.b);
  if constexpr (kSplit) return _mm512_mask_mov_epi16(a, 0xaaaaaaaau, b);
  return join(_mm512_cvtepi32_epi16(a), _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16)));
}

#else  // AVX2

inline __m256i load_packed(const void* p, Whole) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m256i load_packed(const void* p, Lanes lanes) {
  alignas(32) uint16_t buffer[kPair] = {};
  std::memcpy(buffer, p, static_cast<size_t>(lanes.n) * sizeof(uint16_t));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(buffer));
}
inline void store_packed(void* p, __m256i v, Whole) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}
inline void store_packed(void* p, __m256i v, Lanes lanes) {
  alignas(32) uint16_t buffer[kPair];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), v);
  std::memcpy(p, buffer, static_cast<size_t>(lanes.n) * sizeof(uint16_t));
}
inline void stream_packed(void* p, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(p), v); }
inline __m128i first_half(__m256i v) { return _mm256_castsi256_si128(v); }
inline __m128i second_half(__m256i v) { return _mm256_extracti128_si256(v, 1); }
inline __m256i join(__m128i a, __m128i b) { return _mm256_set_m128i(b, a); }

inline Pair split_bf16(__m256i v) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(v, high))};
}
template <bool kSplit>
inline __m256i to_bf16(Pair v) {
  const __m256i a = _mm256_srli_epi32(round_to_bf16(v.a), 16), b = round_to_bf16(v.b);
  if constexpr (kSplit) return _mm256_blend_epi16(a, b, 0xaa);
  // The instruction packs within 128-bit halves.
  const __m256i packed = _mm256_packus_epi32(a, _mm256_srli_epi32(b, 16));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}

#endif

// The lanes of the first and of the second of two vectors in their order.
inline Whole first_half(Whole) { return {}; }
inline Whole second_half(Whole) { return {}; }
inline Lanes first_half(Lanes lanes) { return {lanes.n < kWidth ? lanes.n : kWidth}; }
inline Lanes second_half(Lanes lanes) { return {lanes.n > kWidth ? lanes.n - kWidth : 0}; }

template <bool kSplit, class T, class L = Whole>
inline Pair load_pair(const T* p, L lanes = {}) {
  if constexpr (kSplit && std::is_same_v<T, bf16>) {
    return split_bf16(load_packed(p, lanes));
  } else {
    return {load(p, first_half(lanes)), load(p + kWidth, second_half(lanes))};
  }
}

// Stores v and returns what a reader of it will see. Streaming goes past the caches: the address
// must then be a multiple of a pair's size, and the task that streams must end with `_mm_sfence()`.
template <bool kSplit, bool kStream = false, class T, class L = Whole>
inline Pair store_pair(T* p, Pair v, L lanes = {}) {
  constexpr bool kStreams = kStream && std::is_same_v<L, Whole>;
  auto store_16 = [&](auto bits) {
    if constexpr (kStreams) {
      stream_packed(p, bits);
    } else {
      store_packed(p, bits, lanes);
    }
    return bits;
  };
  if constexpr (std::is_same_v<T, bf16>) {
    const auto bits = store_16(to_bf16<kSplit>(v));
    if constexpr (kSplit) return split_bf16(bits);
    return {from_bf16(first_half(bits)), from_bf16(second_half(bits))};
  } else if constexpr (std::is_same_v<T, fp16>) {
    const auto bits = store_16(join(to_fp16(v.a), to_fp16(v.b)));
    return {from_fp16(first_half(bits)), from_fp16(second_half(bits))};
  } else if constexpr (kStreams) {
    stream(p, v.a), stream(p + kWidth, v.b);
    return v;
  } else {
    store(p, v.a, first_half(lanes)), store(p + kWidth, v.b, second_half(lanes));
    return v;
  }
}

// The same for U / 2 pairs of elements that each stand for themselves.
template <class T, int U, class L>
inline void load_pairs(const T* p, Vec (&v)[U], L lanes) {
  for (int u = 0; u < U; u += 2) {
    const Pair pair = load_pair<kSplits<T>>(p + u * kWidth, lanes);
    v[u] = pair.a, v[u + 1] = pair.b;
  }
}
template <bool kStream, class T, int U, class L>
inline void store_pairs(T* p, const Vec (&v)[U], L lanes) {
  for (int u = 0; u < U; u += 2)
    store_pair<kSplits<T>, kStream>(p + u * kWidth, Pair{v[u], v[u + 1]}, lanes);
}

// Asks for the cache lines of P pairs at p, which may lie outside of any array.
template <int P = 1, class T>
inline void prefetch_pairs(const T* p) {
  for (int at = 0; at < P * kPair * static_cast<int>(sizeof(T)); at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(p) + at, _MM_HINT_T0);
}

// Calls f(i, U, lanes) for the pairs of a row of n elements, U at a time, and one at a time at its
// end: i is the first element, U an integral_constant.
template <int U = 1, class F>
inline __attribute__((always_inline)) void for_pairs(int64_t n, F&& f) {
  using One = std::integral_constant<int, 1>;
  int64_t i = 0;
  for (; i + U * kPair <= n; i += U * kPair) f(i, std::integral_constant<int, U>{}, Whole{});
  if constexpr (U > 1)
    for (; i + kPair <= n; i += kPair) f(i, One{}, Whole{});
  if (i < n) f(i, One{}, Lanes{static_cast<int>(n - i)});
}

}  // namespace neobert
