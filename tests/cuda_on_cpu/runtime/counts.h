// What a kernel's PTX moved and computed, by symbol, since clear_counts().
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "executor.h"

namespace cuda_on_cpu {

// Bytes are of global memory, as often as they were accessed: caches are not modelled. An atomic counts both ways.
struct Counts {
  uint64_t launches = 0;
  uint64_t loaded_bytes = 0, stored_bytes = 0;                 // by threads
  uint64_t bulk_loaded_bytes = 0, bulk_stored_bytes = 0;       // by bulk copies, without what lies outside the tensor
  uint64_t bf16_flop = 0, e4m3_flop = 0;                       // of tensor cores: whole wgmma tiles, with their padding
  uint64_t num_blocks = 0, num_threads = 0, shared_bytes = 0;  // of the last launch
};

void start_launch_counts(const std::string& symbol, dim3 grid, dim3 block, size_t shared_bytes);
// Of the kernel that was launched last.
Counts& counts();
const std::map<std::string, Counts>& counts_by_symbol();
void clear_counts();

}  // namespace cuda_on_cpu
