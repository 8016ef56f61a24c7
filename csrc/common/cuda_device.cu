#include <cuda_runtime.h>

#include "common/cuda_device.h"

namespace k25::cuda {

int num_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // the failure must not surface in the next launch
  return 0;
}

}  // namespace k25::cuda
