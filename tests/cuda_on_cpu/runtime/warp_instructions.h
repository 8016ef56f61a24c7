// Instructions of a whole warp: matrices between registers and shared memory, an elected lane, register budgets.
#pragma once
#include <cstdint>

namespace cuda_on_cpu {

// stmatrix/ldmatrix of `count` 8x8 matrices of 16-bit elements: lane 8 j + r has the place of row r of matrix j.
void store_matrices(uint64_t row, const uint32_t* values, int count, bool transposed, int line);
void load_matrices(uint64_t row, uint32_t* values, int count, bool transposed, int line);

// Whether this is the lane that elect.sync picks, and which lane that is.
bool elect(uint32_t mask, uint32_t& leader);

void start_block_registers();
// Fails if warpgroups took more registers than an SM has, or their warps disagree.
void finish_block_registers();
void set_max_registers(uint32_t count, bool increase);

}  // namespace cuda_on_cpu
