// What the kernels need to know of the machine, and what the bench measures of it.
#pragma once
#include <cstdint>

namespace k25::cpu {

// Asks for huge pages behind a large fresh buffer, so that its first touch faults once in 2 MiB and not once in 4 KiB.
// A hint: it does nothing for small buffers or where the kernel refuses.
void advise_huge_pages(void* address, int64_t bytes);

// Multiply-adds of the current instruction set's inner loop without any memory access, on the calling thread: the
// compute ceiling, in GFLOP/s over `seconds`. dtype as in DType.
double peak_gflops(int dtype, double seconds);

}  // namespace k25::cpu
