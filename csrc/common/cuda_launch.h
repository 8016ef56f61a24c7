// The only place that says how a kernel is started. Under nvcc it is <<<>>>; the executor of tests/cuda_on_cpu
// compiles the same .cu files with g++ and supplies its own K25_LAUNCH.
#pragma once
#include "common/types.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace k25::cuda {
inline void check_launch(const char* where) {
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(where) + ": launch failed: " + cudaGetErrorString(status));
  }
}

// Of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    throw std::runtime_error("the CUDA runtime names no current device");
  }
  return count;
}

// More dynamic shared memory than the 48 KB that a kernel gets without asking.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("shared memory of a kernel: ") + cudaGetErrorString(status));
  }
}
}  // namespace k25::cuda

#define K25_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                               \
  do {                                                                                           \
    kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    ::k25::cuda::check_launch(__PRETTY_FUNCTION__);                                              \
  } while (0)
#else
#include "cuda_on_cpu.h"
#endif
