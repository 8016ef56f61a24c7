// What nvcc provides, for g++: csrc's .cu files compile unchanged against this and run on the executor.
#pragma once
#include <cuda.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::cuda_on_cpu::current_thread().thread)
#define blockIdx (::cuda_on_cpu::current_thread().block)
#define blockDim (::cuda_on_cpu::current_thread().block_dim)
#define gridDim (::cuda_on_cpu::current_thread().grid_dim)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// The part of the CUDA runtime that csrc calls. The only driver function that is found is cuTensorMapEncodeTiled.
enum cudaError_t { cudaSuccess };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult* result);

namespace cuda_on_cpu {

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// cvt.rn.satfinite.e4m3x2.f32: by a search among all values, which shares nothing with the encoders that it checks.
inline uint8_t to_e4m3(float value) {
  if (value != value) return 0x7f;
  const auto decoded = [](int code) {
    return code < 8 ? std::ldexp(float(code), -9) : std::ldexp(float(8 + code % 8), code / 8 - 10);
  };
  const double size = std::abs(double(value));
  int code = 0;
  while (code < 0x7e) {
    const double middle = (double(decoded(code)) + double(decoded(code + 1))) / 2;
    if (size < middle || (size == middle && code % 2 == 0)) break;
    ++code;
  }
  return uint8_t(code | (std::signbit(value) ? 0x80 : 0));
}
inline uint16_t e4m3_pair(float low, float high) { return uint16_t(to_e4m3(high) << 8 | to_e4m3(low)); }

// `source_lane` in 0..31 of the lanes in `mask`; every lane hands in `value`.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int source_lane) {
  uint64_t bits = 0, values[kWarpSize];
  std::memcpy(&bits, &value, sizeof(value));
  warp_exchange(what, mask, bits, values);
  T result;
  std::memcpy(&result, &values[source_lane], sizeof(result));
  return result;
}

template <class T, class Fold>
T reduce(const char* what, unsigned mask, T value, Fold fold) {
  uint64_t values[kWarpSize];
  warp_exchange(what, mask, value, values);
  T result = value;
  for (int i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) result = fold(result, T(values[i]));
  }
  return result;
}

inline int lane() { return current_thread().linear % kWarpSize; }

// Runs the PTX that was translated for the kernel with this symbol. parameters[i] points to the i-th parameter.
void run_ptx(void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* const* parameters);
std::string symbol_of(void* kernel);

template <class... Parameters>
struct SourceCall {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> parameters;
  static void run(void* context) {
    auto& call = *static_cast<SourceCall*>(context);
    std::apply(call.kernel, call.parameters);
  }
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  SourceCall<Parameters...> call{kernel, {arguments...}};
  if (!options().use_ptx) {
    run_grid(symbol_of(reinterpret_cast<void*>(kernel)), grid, block, shared_bytes, &call.run, &call);
    return;
  }
  const auto addresses =
      std::apply([](auto&... values) { return std::array<void*, sizeof...(values)>{static_cast<void*>(&values)...}; },
                 call.parameters);
  run_ptx(reinterpret_cast<void*>(kernel), grid, block, shared_bytes, addresses.data());
}

}  // namespace cuda_on_cpu

#define K25_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), ::cuda_on_cpu::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))

using std::exp;
using std::fma;
using std::min;

inline void __syncthreads() { cuda_on_cpu::block_barrier(0); }
inline void __syncwarp(unsigned mask = ~0u) { cuda_on_cpu::warp_barrier(mask); }
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("trap"); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_on_cpu::shuffle("shfl.sync.bfly", mask, value, cuda_on_cpu::lane() ^ distance);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source_lane) {
  return cuda_on_cpu::shuffle("shfl.sync.idx", mask, value, source_lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle("shfl.sync.up", mask, value, lane < distance ? lane : lane - distance);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return cuda_on_cpu::reduce("redux.sync.max", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return cuda_on_cpu::reduce("redux.sync.min", mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  uint64_t values[cuda_on_cpu::kWarpSize];
  cuda_on_cpu::warp_exchange("match.any.sync", mask, uint32_t(value), values);
  unsigned same = 0;
  for (int i = 0; i < cuda_on_cpu::kWarpSize; ++i) {
    if (mask >> i & 1 && uint32_t(values[i]) == uint32_t(value)) same |= 1u << i;
  }
  return same;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline float __uint_as_float(unsigned bits) { return cuda_on_cpu::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::bit_cast<unsigned>(value); }
inline long long __double_as_longlong(double value) { return cuda_on_cpu::bit_cast<long long>(value); }
inline int __double2loint(double value) { return int(cuda_on_cpu::bit_cast<uint64_t>(value)); }
inline int __double2hiint(double value) { return int(cuda_on_cpu::bit_cast<uint64_t>(value) >> 32); }
inline double __hiloint2double(int high, int low) {
  return cuda_on_cpu::bit_cast<double>(uint64_t(uint32_t(high)) << 32 | uint32_t(low));
}

namespace k25::cuda {
inline uint32_t to_bf16_pair(float low, float high) {
  return uint32_t(cuda_on_cpu::to_bf16(high)) << 16 | cuda_on_cpu::to_bf16(low);
}
inline uint32_t to_e4m3_pair(float low, float high) { return cuda_on_cpu::e4m3_pair(low, high); }
inline void store_words(uint4* p, uint4 words) { *p = words; }
inline void* shared_memory() { return cuda_on_cpu::shared_memory(); }
// Few, so that a block of a persistent kernel has several tiles.
inline int num_multiprocessors() { return 3; }
template <class Kernel>
void allow_shared_memory(Kernel, int) {}
}  // namespace k25::cuda

#include "hopper_on_cpu.h"
