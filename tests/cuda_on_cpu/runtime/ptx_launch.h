// Launches of translated PTX by symbol.
#pragma once
#include <string>
#include <vector>

#include "executor.h"

namespace cuda_on_cpu {

std::vector<std::string> ptx_symbols();
void run_ptx_symbol(const std::string& symbol, dim3 grid, dim3 block, size_t shared_bytes, void* const* parameters);

}  // namespace cuda_on_cpu
