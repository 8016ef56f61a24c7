// wgmma on operands in shared memory. The 128 threads of a warpgroup meet in every wgmma and wait; lazy, a wgmma reads
// shared memory only when its group is waited for, and its registers hold NaN until then.
#pragma once
#include <cstdint>

namespace cuda_on_cpu {

enum class MmaType { bf16, e4m3 };

struct WgmmaShape {
  MmaType type;
  int n;                        // of m64n*k16 (bf16) or m64n*k32 (e4m3)
  bool negate_a, negate_b;      // imm-scale -1
  bool mn_major_a, mn_major_b;  // imm-trans
};

void start_block_wgmma();
// Fails on a wgmma that nobody waited for.
void finish_block_wgmma();

void wgmma_fence();
// registers[i] is the i-th of the thread's n / 2 accumulators; `accumulate` is scale-d.
void wgmma(const WgmmaShape& shape, uint64_t a, uint64_t b, bool accumulate, float* const* registers, int line);
void wgmma_commit_group();
void wgmma_wait_group(uint32_t pending);

}  // namespace cuda_on_cpu
