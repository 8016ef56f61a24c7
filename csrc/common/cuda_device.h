// What the CUDA runtime says of this machine.
#pragma once

namespace k25::cuda {

// 0 where there is no device or no driver: the library loads there too.
int num_devices();

}  // namespace k25::cuda
