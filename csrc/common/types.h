// Element types and the memory views that every op's api.h is written in.
#pragma once
#include <cstdint>

// What both the CPU and device code call.
#if defined(__CUDACC__)
#define K25_EVERYWHERE __host__ __device__ __forceinline__
#else
#define K25_EVERYWHERE inline __attribute__((always_inline))
#endif

namespace k25 {

// The numbers are part of the Python binding (k25sys/ops/native.py).
enum class DType : int { f32 = 0, bf16 = 1, f64 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// cudaStream_t without the CUDA headers: the CPU side includes the same api.h.
using Stream = void*;

}  // namespace k25
