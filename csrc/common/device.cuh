// What device code of every op shares: elements of 1 or 16 bytes' worth at a time, conversions, warp reductions.
// Compiled by nvcc, and by g++ with the shim of tests/cuda_on_cpu.
#pragma once
#include "common/cuda_launch.h"
#include "common/types.h"

namespace k25::cuda {

struct Bf16 {
  uint16_t bits;
};

// Arithmetic is done in float, for double in double.
template <class Element>
struct Compute {
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Scalar = double;
};
template <class Element>
using ScalarOf = typename Compute<Element>::Scalar;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Elements in one access: 16 bytes, or one element where addresses or row lengths are not multiples of 16 bytes.
template <class Element, bool kVectorized>
constexpr int kPerAccess = kVectorized ? int(16 / sizeof(Element)) : 1;

__device__ __forceinline__ void require(bool condition) {
  if (!condition) __trap();
}

#if defined(__CUDACC__)
// The bfloat16 nearest to each, ties to even; `low` in the low half.
__device__ __forceinline__ uint32_t to_bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// One 16-byte store to global memory: nvcc splits the assignment of a uint4 where it has its words in registers.
__device__ __forceinline__ void store_words(uint4* p, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 block_shared_memory[];
  return block_shared_memory;
}
#endif

__device__ __forceinline__ float load_one(const float* p) { return __ldg(p); }
__device__ __forceinline__ double load_one(const double* p) { return __ldg(p); }
__device__ __forceinline__ float load_one(const Bf16* p) {
  return __uint_as_float(uint32_t(__ldg(reinterpret_cast<const unsigned short*>(p))) << 16);
}
__device__ __forceinline__ void store_one(float* p, float value) { *p = value; }
__device__ __forceinline__ void store_one(double* p, double value) { *p = value; }
__device__ __forceinline__ void store_one(Bf16* p, float value) { p->bits = uint16_t(to_bf16_pair(value, 0.0f)); }

__device__ __forceinline__ void unpack(uint4 words, float (&values)[4]) {
  values[0] = __uint_as_float(words.x);
  values[1] = __uint_as_float(words.y);
  values[2] = __uint_as_float(words.z);
  values[3] = __uint_as_float(words.w);
}
__device__ __forceinline__ void unpack(uint4 words, float (&values)[8]) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(pairs[i] << 16);
    values[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(uint4 words, double (&values)[2]) {
  values[0] = __hiloint2double(int(words.y), int(words.x));
  values[1] = __hiloint2double(int(words.w), int(words.z));
}
__device__ __forceinline__ uint4 pack(const float (&values)[4]) {
  return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                    __float_as_uint(values[3]));
}
__device__ __forceinline__ uint4 pack(const float (&values)[8]) {
  return make_uint4(to_bf16_pair(values[0], values[1]), to_bf16_pair(values[2], values[3]),
                    to_bf16_pair(values[4], values[5]), to_bf16_pair(values[6], values[7]));
}
__device__ __forceinline__ uint4 pack(const double (&values)[2]) {
  return make_uint4(uint32_t(__double2loint(values[0])), uint32_t(__double2hiint(values[0])),
                    uint32_t(__double2loint(values[1])), uint32_t(__double2hiint(values[1])));
}

// Reads data that the kernel does not write: kCount is 1, or 16 bytes' worth from a 16-byte-aligned address.
template <int kCount, class Element>
__device__ __forceinline__ void load(const Element* p, ScalarOf<Element> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = load_one(p);
  } else {
    unpack(__ldg(reinterpret_cast<const uint4*>(p)), values);
  }
}

template <int kCount, class Element>
__device__ __forceinline__ void store(Element* p, const ScalarOf<Element> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    store_one(p, values[0]);
  } else {
    store_words(reinterpret_cast<uint4*>(p), pack(values));
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// The same sum in every lane, added in the same order whatever the timing.
template <class Scalar>
__device__ __forceinline__ Scalar warp_sum(Scalar value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// ---- host side

inline bool aligned16() { return true; }
template <class... Rest>
bool aligned16(const void* pointer, Rest... rest) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && aligned16(rest...);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls run(Element{}) with the element type that `dtype` names.
template <class Run>
void with_element(DType dtype, Run run) {
  if (dtype == DType::bf16) return run(Bf16{});
  if (dtype == DType::f32) return run(float{});
  run(double{});
}

}  // namespace k25::cuda
