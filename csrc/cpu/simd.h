// One vector type, `Vec`, of 16 (AVX-512) or 8 (AVX2) floats, and what the kernels need of it.
//
// Every kernel file is compiled once per instruction set (see setup.py) and the right library is
// chosen when the package is imported, so this header selects by the compiler's own macros and
// holds no run-time dispatch. bfloat16 and float16 are converted at load and store; all arithmetic
// is float32.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "The CPU kernels need at least AVX2, FMA and F16C"
#endif

namespace neobert {

using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

#if defined(__AVX512F__)

using Vec = __m512;
constexpr int kWidth = 16;

inline __mmask16 mask_of(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
inline Vec fnmadd(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
inline Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline float hsum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float hmax(Vec a) { return _mm512_reduce_max_ps(a); }
// -|a|, but not below -limit.
inline Vec minus_abs(Vec a, float limit) { return _mm512_range_ps(a, set1(limit), 0b1110); }
inline Vec if_negative(Vec test, Vec yes, Vec no) {  // by the sign bit, lane by lane
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(test)), no, yes);
}
// a * factor where a is negative, else a.
inline Vec scale_negative(Vec a, Vec factor) {
  return _mm512_mask_mul_ps(a, _mm512_movepi32_mask(_mm512_castps_si512(a)), a, factor);
}
// (x0, x1, x2, x3, …) -> (x1, x0, x3, x2, …).
inline Vec swap_pairs(Vec a) { return _mm512_permute_ps(a, 0xB1); }
// (a0, a0, a1, a1, …) from the first half of a vector, and from the second.
inline Vec first_twice(Vec a) {
  const __m512i index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(index, a);
}
inline Vec second_twice(Vec a) {
  const __m512i index = _mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
  return _mm512_permutexvar_ps(index, a);
}
// a*b - c in even lanes, a*b + c in odd lanes: a complex product in one instruction.
inline Vec fmaddsub(Vec a, Vec b, Vec c) { return _mm512_fmaddsub_ps(a, b, c); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask_of(n), p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, mask_of(n), v); }
inline void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }

inline Vec from_bf16(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
// 32-bit lanes whose upper half is v rounded to nearest even. NaN stays NaN.
inline __m512i round_to_bf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline __mmask16 is_denormal(Vec v) { return _mm512_fpclass_ps_mask(v, 0x20); }
inline __m256i to_bf16(Vec v) {
#if defined(__AVX512BF16__)
  // The instruction is a fifth of the work but takes denormal numbers for zero: there are few.
  if (is_denormal(v) == 0) [[likely]] return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16));
}
inline __m256i load16(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline __m256i load16(const void* p, int n) { return _mm256_maskz_loadu_epi16(mask_of(n), p); }
inline void store16(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline void store16(void* p, __m256i v, int n) { _mm256_mask_storeu_epi16(p, mask_of(n), v); }
inline Vec from_fp16(__m256i h) { return _mm512_cvtph_ps(h); }
inline __m256i to_fp16(Vec v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// x * 2^n for integral n, right also where the result is denormal or overflows.
inline Vec scale_by_pow2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// v in the first n lanes, `fill` in the others.
inline Vec fill_after(Vec v, int n, Vec fill) { return _mm512_mask_blend_ps(mask_of(n), fill, v); }
inline Vec round_nearest(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#else  // AVX2

using Vec = __m256;
constexpr int kWidth = 8;

inline __m256i mask_of(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline float hsum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float hmax(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec minus_abs(Vec a, float limit) {
  return _mm256_max_ps(_mm256_or_ps(a, set1(-0.0f)), set1(-limit));
}
inline Vec if_negative(Vec test, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, test); }
inline Vec scale_negative(Vec a, Vec factor) { return a * if_negative(a, factor, set1(1.0f)); }
inline Vec swap_pairs(Vec a) { return _mm256_permute_ps(a, 0xB1); }
inline Vec first_twice(Vec a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}
inline Vec second_twice(Vec a) {
  return _mm256_permutevar8x32_ps(a, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
}
inline Vec fmaddsub(Vec a, Vec b, Vec c) { return _mm256_fmaddsub_ps(a, b, c); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const float* p, int n) { return _mm256_maskload_ps(p, mask_of(n)); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(float* p, Vec v, int n) { _mm256_maskstore_ps(p, mask_of(n), v); }
inline void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }

inline Vec from_bf16(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256i round_to_bf16(Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline __m128i to_bf16(Vec v) {
  const __m256i bits = _mm256_srli_epi32(round_to_bf16(v), 16);
  const __m256i packed = _mm256_packus_epi32(bits, bits);  // within 128-bit halves
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load16(const void* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
inline void store16(void* p, __m128i v, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(uint16_t));
}
inline Vec from_fp16(__m128i h) { return _mm256_cvtph_ps(h); }
inline __m128i to_fp16(Vec v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vec pow2_of(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// Two factors, since 2^n itself may be denormal or infinite where x * 2^n is neither.
inline Vec scale_by_pow2(Vec x, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  return x * pow2_of(half) * pow2_of(_mm256_sub_epi32(exponent, half));
}
inline Vec fill_after(Vec v, int n, Vec fill) {
  return _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(mask_of(n)));
}
inline Vec round_nearest(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#endif

inline Vec load(const bf16* p) { return from_bf16(load16(p)); }
inline Vec load(const bf16* p, int n) { return from_bf16(load16(p, n)); }
inline void store(bf16* p, Vec v) { store16(p, to_bf16(v)); }
inline void store(bf16* p, Vec v, int n) { store16(p, to_bf16(v), n); }
inline Vec load(const fp16* p) { return from_fp16(load16(p)); }
inline Vec load(const fp16* p, int n) { return from_fp16(load16(p, n)); }
inline void store(fp16* p, Vec v) { store16(p, to_fp16(v)); }
inline void store(fp16* p, Vec v, int n) { store16(p, to_fp16(v), n); }

// The lanes of a vector that lie within a row: all of them, or at its end the first n.
struct Whole {};
struct Lanes {
  int n;
};
template <class T>
inline Vec load(const T* p, Whole) { return load(p); }
template <class T>
inline Vec load(const T* p, Lanes lanes) { return load(p, lanes.n); }
inline Vec fill_after(Vec v, Whole, Vec) { return v; }
inline Vec fill_after(Vec v, Lanes lanes, Vec fill) { return fill_after(v, lanes.n, fill); }
template <class T>
inline void store(T* p, Vec v, Whole) { store(p, v); }
template <class T>
inline void store(T* p, Vec v, Lanes lanes) { store(p, v, lanes.n); }

// Calls f(i, u, lanes) for each vector of a row of n elements: i is its first element, and u counts
// 0 … U-1 over and over, so that sums kept in U accumulators do not wait for one another.
template <int U = 1, class F>
inline __attribute__((always_inline)) void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + U * kWidth <= n; i += U * kWidth) {
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) f(i + u * kWidth, u, Whole{});
  }
  for (; i + kWidth <= n; i += kWidth) f(i, 0, Whole{});
  if (i < n) f(i, 0, Lanes{static_cast<int>(n - i)});
}

// The same in groups of U vectors: f(i, U, Whole), and at the end of the row f(i, 1, lanes). The
// count is an integral_constant.
template <int U, class F>
inline __attribute__((always_inline)) void for_groups(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + U * kWidth <= n; i += U * kWidth) f(i, std::integral_constant<int, U>{}, Whole{});
  for_vectors(n - i, [&](int64_t at, int, auto lanes) {
    f(i + at, std::integral_constant<int, 1>{}, lanes);
  });
}

// memcpy past the caches, of a multiple of 64 bytes to a multiple of 64.
inline void stream_copy(void* to, const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32) {
    const char* source = static_cast<const char*>(from) + i;
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i), v);
  }
}

// e^x within 1 ulp, for x from -104 to 89: x = n ln2 + r, |r| <= ln2/2, then 2^n e^r, where e^r is
// 1 + r + r^2 times a polynomial, the minimax one of its degree for the relative error (2^-28).
// ln2 is split so that n * ln2 is exact.
//
// In place on U vectors, step by step: each step waits for the one before, and other vectors are
// the only work with which to fill the wait.
template <int U>
inline __attribute__((always_inline)) void exp_in_range(Vec (&x)[U]) {
  Vec n[U], p[U];
  for (int u = 0; u < U; ++u) n[u] = round_nearest(x[u] * set1(1.44269504088896341f));
  for (int u = 0; u < U; ++u) x[u] = fnmadd(n[u], set1(0.693145751953125f), x[u]);
  for (int u = 0; u < U; ++u) x[u] = fnmadd(n[u], set1(1.42860682030941723e-6f), x[u]);
  for (int u = 0; u < U; ++u) p[u] = fmadd(set1(1.3814599e-3f), x[u], set1(8.3687169e-3f));
  for (int u = 0; u < U; ++u) p[u] = fmadd(p[u], x[u], set1(4.1668388e-2f));
  for (int u = 0; u < U; ++u) p[u] = fmadd(p[u], x[u], set1(1.6666521e-1f));
  for (int u = 0; u < U; ++u) p[u] = fmadd(p[u], x[u], set1(4.9999994e-1f));
  for (int u = 0; u < U; ++u) p[u] = fmadd(p[u], x[u], set1(1.0f));
  for (int u = 0; u < U; ++u) p[u] = fmadd(p[u], x[u], set1(1.0f));
  for (int u = 0; u < U; ++u) x[u] = scale_by_pow2(p[u], n[u]);
}

// The same for every x: beyond the clamp float32 results are 0 or infinity; NaN passes through (of
// two operands vmin and vmax return the second when one is NaN).
template <int U>
inline __attribute__((always_inline)) void exp(Vec (&x)[U]) {
  for (int u = 0; u < U; ++u) x[u] = vmin(set1(89.0f), vmax(set1(-104.0f), x[u]));
  exp_in_range(x);
}

inline Vec exp(Vec x) {
  Vec one[1] = {x};
  exp(one);
  return one[0];
}

}  // namespace neobert
