// E4M3 (FN: no infinities, NaN is 0x7f and 0xff, largest 448) to and from f32.
#pragma once
#include "common/cpu/simd.h"

namespace k25::cpu::K25_ISA {

typedef uint8_t U8V __attribute__((vector_size(kLanes)));

K25_INLINE U8V narrow_to_bytes(U32V words) {  // each below 256
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(K25_EMULATED_BF16)
  const __m256i halves = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  const __m256i bytes = _mm256_packus_epi16(halves, halves);  // each half of 128 bits four times
  typedef uint32_t U32x2 __attribute__((vector_size(8)));
  return (U8V)U32x2{uint32_t(_mm256_extract_epi32(bytes, 0)), uint32_t(_mm256_extract_epi32(bytes, 4))};
#else
  return __builtin_convertvector(words, U8V);
#endif
}

// Nearest, ties to even; what lies beyond 448 becomes 448, NaN and infinities NaN.
K25_INLINE U8V encode_e4m3(F32V value) {
  const U32V bits = (U32V)value;
  const U32V sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  const U32V normal = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 codes are multiples of 2^-9: adding 2^14 rounds to them in the low bits.
  const U32V subnormal = (U32V)((F32V)size + 16384.0f) - 0x46800000u;
  U32V code = (U32V)(size < 0x3c800000u) ? subnormal : normal;
  code = (U32V)(size > 0x43e00000u) ? U32V{} + 0x7eu : code;
  code = (U32V)(size >= 0x7f800000u) ? U32V{} + 0x7fu : code;
  return narrow_to_bytes(code | sign);
}

K25_INLINE F32V decode_e4m3(U8V codes) {
  const U32V code = __builtin_convertvector(codes, U32V);
  const U32V size = code & 0x7fu;
  const U32V normal = (size << 20) + (120u << 23);
  const U32V subnormal = (U32V)(__builtin_convertvector((I32V)size, F32V) * 0.001953125f);  // 2^-9
  U32V bits = (U32V)(size < 8u) ? subnormal : normal;
  bits = (U32V)(size == 0x7fu) ? U32V{} + 0x7fc00000u : bits;
  return (F32V)(bits | (code & 0x80u) << 24);
}

// The same as bits of bf16, which holds every code: half the width, and no rounding.
K25_INLINE U16V decode_e4m3_to_bf16(U8V codes) {
#if defined(__AVX512BF16__)
  const U16V code = __builtin_convertvector(codes, U16V);
  const U16V size = code & uint16_t(0x7f);
  const U16V subnormal = {0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};  // multiples of 2^-9
  U16V bits = (size << 4) + uint16_t(120 << 7);
  bits = (U16V)(size < uint16_t(8)) ? __builtin_shuffle(subnormal, size) : bits;
  bits = (U16V)(size == uint16_t(0x7f)) ? U16V{} + uint16_t(0x7fc0) : bits;
  return bits | (code & uint16_t(0x80)) << 8;
#else
  return narrow(decode_e4m3(codes));
#endif
}

// The first `count` codes, zeros after them.
K25_INLINE U8V load_codes(const uint8_t* from, int64_t count) {
  U8V codes{};
  if (count >= kLanes) {
    std::memcpy(&codes, from, kLanes);  // of a known size: no call
  } else {
    std::memcpy(&codes, from, size_t(count));
  }
  return codes;
}
K25_INLINE void store_codes(uint8_t* to, U8V codes, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &codes, kLanes);
  } else {
    std::memcpy(to, &codes, size_t(count));
  }
}

}  // namespace k25::cpu::K25_ISA
