// Vectors of the instruction set that this translation unit is compiled for (K25_ISA, set by CMakeLists.txt).
// Everything here lives in a namespace of that name, so that no code built for one instruction set can be linked into
// another; for the same reason these units use no inline function of the standard library.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common/types.h"

#define K25_INLINE inline __attribute__((always_inline))
#define K25_INLINE_LAMBDA __attribute__((always_inline))

namespace k25::cpu::K25_ISA {

#if defined(__AVX512F__) || defined(K25_EMULATED_BF16)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32V __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32V __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32V __attribute__((vector_size(4 * kLanes)));
typedef uint16_t U16V __attribute__((vector_size(2 * kLanes)));
typedef double F64V __attribute__((vector_size(8 * (kLanes / 2))));
typedef uint64_t U64V __attribute__((vector_size(8 * (kLanes / 2))));

template <class V, class T>
K25_INLINE V load(const T* from) {
  V out;
  std::memcpy(&out, from, sizeof(V));
  return out;
}

template <class V, class T>
K25_INLINE void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

K25_INLINE F32V splat(float value) { return value - F32V{}; }
K25_INLINE F64V splat(double value) { return value - F64V{}; }

struct Bf16 {
  uint16_t bits;
};

K25_INLINE F32V widen(U16V bits) { return (F32V)(__builtin_convertvector(bits, U32V) << 16); }

K25_INLINE U16V narrow(F32V value) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return (U16V)_mm512_cvtneps_pbh((__m512)value);
#else
  const U32V bits = (U32V)value;
  const U32V rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32V quiet = (bits >> 16) | 0x40u;
  const U32V words = (U32V)(value != value) ? quiet : rounded;
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(K25_EMULATED_BF16)
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);  // each half of 128 bits twice
  return (U16V)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(words, U16V);
#endif
#endif
}

K25_INLINE float to_float(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

K25_INLINE Bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return Bf16{uint16_t((bits >> 16) | 0x40u)};
  return Bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Loads and stores of elements as the vector they are computed in: float and bf16 in F32V, double in F64V.
template <class Element>
struct Compute {
  using Scalar = float;
  using Vector = F32V;
};
template <>
struct Compute<double> {
  using Scalar = double;
  using Vector = F64V;
};

K25_INLINE F32V load_compute(const float* from) { return load<F32V>(from); }
K25_INLINE F64V load_compute(const double* from) { return load<F64V>(from); }
K25_INLINE F32V load_compute(const Bf16* from) { return widen(load<U16V>(from)); }
K25_INLINE void store_compute(float* to, F32V value) { store(to, value); }
K25_INLINE void store_compute(double* to, F64V value) { store(to, value); }
K25_INLINE void store_compute(Bf16* to, F32V value) { store(to, narrow(value)); }

K25_INLINE float load_scalar(const float* from) { return *from; }
K25_INLINE double load_scalar(const double* from) { return *from; }
K25_INLINE float load_scalar(const Bf16* from) { return to_float(*from); }
K25_INLINE void store_scalar(float* to, float value) { *to = value; }
K25_INLINE void store_scalar(double* to, double value) { *to = value; }
K25_INLINE void store_scalar(Bf16* to, float value) { *to = to_bf16(value); }

// The first `count` elements, zeros after them.
template <class Element>
K25_INLINE typename Compute<Element>::Vector load_partial(const Element* from, int64_t count) {
  using Vector = typename Compute<Element>::Vector;
  constexpr int lanes = sizeof(Vector) / sizeof(typename Compute<Element>::Scalar);
  if (count >= lanes) return load_compute(from);
  Element buffer[lanes] = {};
  if (count > 0) std::memcpy(buffer, from, size_t(count) * sizeof(Element));
  return load_compute(buffer);
}

template <class Element>
K25_INLINE void store_partial(Element* to, typename Compute<Element>::Vector value, int64_t count) {
  using Vector = typename Compute<Element>::Vector;
  constexpr int lanes = sizeof(Vector) / sizeof(typename Compute<Element>::Scalar);
  if (count >= lanes) return store_compute(to, value);
  Element buffer[lanes];
  store_compute(buffer, value);
  if (count > 0) std::memcpy(to, buffer, size_t(count) * sizeof(Element));
}

// Writes past the caches, for results that are not read again soon: no line is fetched to be overwritten. `to` must be
// aligned to the vector. stream_fence() makes them visible to other threads.
template <class V>
K25_INLINE void stream(void* to, V value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)to, (__m512i)value);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)to, (__m256i)value);
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)to, (__m128i)value);
#endif
  store(static_cast<char*>(to), value);
}
K25_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
K25_INLINE void stream_compute(float* to, F32V value) { stream(to, value); }
K25_INLINE void stream_compute(double* to, F64V value) { stream(to, value); }
K25_INLINE void stream_compute(Bf16* to, F32V value) { stream(to, narrow(value)); }

// The value as it would be after a trip through memory.
K25_INLINE F32V round_to(F32V value, const float*) { return value; }
K25_INLINE F64V round_to(F64V value, const double*) { return value; }
K25_INLINE F32V round_to(F32V value, const Bf16*) { return widen(narrow(value)); }

template <class V>
K25_INLINE auto sum_lanes(V value) {  // fixed order
  auto total = value[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(value[0]); ++i) total += value[i];
  return total;
}

// The larger lane by lane; where one is NaN, b.
K25_INLINE F32V larger(F32V a, F32V b) {
#if defined(__AVX512F__)
  return (F32V)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // gcc 12 warns of the plain one
#elif defined(__AVX2__) && !defined(K25_EMULATED_BF16)
  return (F32V)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
K25_INLINE F64V larger(F64V a, F64V b) { return a > b ? a : b; }

// exp(x) to 1-2 ulp: 2^n * p(r), |r| <= ln(2) / 2. Overflow gives inf, underflow 0, NaN stays NaN.
K25_INLINE F32V exp(F32V x) {
  const F32V clamped = x > 88.722839f ? splat(88.722839f) : (x < -87.336544f ? splat(-87.336544f) : x);
  const F32V magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const F32V shifted = clamped * 1.44269504088896341f + magic;
  const F32V n = shifted - magic;
  const F32V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  F32V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Two halves of the exponent: n may be 128, which one float exponent cannot hold.
  const I32V whole = (I32V)shifted - (I32V)magic;
  const I32V half = whole >> 1;
  const F32V result = p * (F32V)((half + 127) << 23) * (F32V)((whole - half + 127) << 23);
  const F32V bounded = x > 88.722839f ? splat(__builtin_inff()) : (x < -87.336544f ? F32V{} : result);
  return x != x ? x : bounded;
}

K25_INLINE F64V exp(F64V x) {  // f64 serves gradient checks: clarity before speed
  for (unsigned i = 0; i < sizeof(F64V) / 8; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

template <class V>
K25_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

}  // namespace k25::cpu::K25_ISA
