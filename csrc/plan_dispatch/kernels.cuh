// Device code of the stable counting sort, in three launches: count each block's slots by expert; sum the counts over
// the blocks before; place every slot. Atomics only count, so their order cannot show in the result.
#pragma once
#include "common/device.cuh"
#include "plan_dispatch/api.h"

namespace k25::cuda {

constexpr int kPlanWarps = 8;
constexpr int kPlanThreads = kPlanWarps * kWarpSize;
constexpr int kSlotsPerWarp = 512;
constexpr int kSlotsPerBlock = kPlanWarps * kSlotsPerWarp;

// Sizes and tables of one sort. block_counts is (E, num_blocks).
struct PlanSizes {
  int64_t num_slots, num_blocks;
  int num_experts;
  bool vectorized;  // ids start at a 16-byte boundary
};

// Adds the slots [begin, end) to counts, by all lanes of one warp. begin is a multiple of 4.
template <class Id>
__device__ __forceinline__ void count_slots(const Id* ids, int64_t begin, int64_t end, const PlanSizes& sizes,
                                            int32_t* counts) {
  constexpr int kIds = 16 / sizeof(Id);
  const int lane = threadIdx.x % kWarpSize;
  const auto count = [&](Id id) {
    require(id >= 0 && id < sizes.num_experts);
    atomicAdd(counts + id, 1);
  };
  int64_t slot = begin;
  if (sizes.vectorized) {
    for (; slot + kWarpSize * kIds <= end; slot += kWarpSize * kIds) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(ids + slot) + lane);
      if constexpr (kIds == 4) {
        count(Id(words.x));
        count(Id(words.y));
        count(Id(words.z));
        count(Id(words.w));
      } else {
        count(Id(uint64_t(words.y) << 32 | words.x));
        count(Id(uint64_t(words.w) << 32 | words.z));
      }
    }
  }
  for (slot += lane; slot < end; slot += kWarpSize) count(__ldg(ids + slot));
}

template <class Id>
__global__ void __launch_bounds__(kPlanThreads) count_slots_kernel(PlanDispatch p, PlanSizes sizes) {
  int32_t* counts = static_cast<int32_t*>(shared_memory());  // (E)
  for (int e = threadIdx.x; e < sizes.num_experts; e += kPlanThreads) counts[e] = 0;
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.x) * kSlotsPerBlock + threadIdx.x / kWarpSize * kSlotsPerWarp;
  const int64_t end = begin + kSlotsPerWarp < sizes.num_slots ? begin + kSlotsPerWarp : sizes.num_slots;
  count_slots(static_cast<const Id*>(p.experts), begin, end, sizes, counts);
  __syncthreads();
  for (int e = threadIdx.x; e < sizes.num_experts; e += kPlanThreads) {
    p.workspace[e * sizes.num_blocks + blockIdx.x] = counts[e];
  }
}

// For each lane, the sum over the lanes up to it.
__device__ __forceinline__ int32_t warp_inclusive_scan(int32_t value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

// For each thread, the sum over the threads before it; `total` gets the block's sum. `warp_sums` is (kPlanWarps) of
// shared memory, free again after the next __syncthreads.
__device__ __forceinline__ int32_t block_exclusive_scan(int32_t value, int32_t* warp_sums, int32_t& total) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int32_t inclusive = warp_inclusive_scan(value);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before_warp = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kPlanWarps; ++w) {
    if (w < warp) before_warp += warp_sums[w];
    total += warp_sums[w];
  }
  return before_warp + inclusive - value;
}

// A warp for each expert: its counts become the sums over the blocks before, and its total is written.
__global__ void __launch_bounds__(kPlanThreads) scan_blocks_kernel(PlanDispatch p, PlanSizes sizes) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t e = int64_t(blockIdx.x) * kPlanWarps + threadIdx.x / kWarpSize;
  if (e >= sizes.num_experts) return;
  int32_t* counts = p.workspace + e * sizes.num_blocks;
  int32_t carried = 0;
  for (int64_t first = 0; first < sizes.num_blocks; first += kWarpSize) {
    const int64_t b = first + lane;
    const int32_t count = b < sizes.num_blocks ? counts[b] : 0;
    const int32_t inclusive = warp_inclusive_scan(count);
    if (b < sizes.num_blocks) counts[b] = carried + inclusive - count;
    carried += __shfl_sync(kAllLanes, inclusive, kWarpSize - 1);
  }
  if (lane == 0) p.tokens_per_expert[e] = carried;
}

// next[w][e] becomes the row where warp w of this block puts its first slot of expert e.
template <class Id>
__device__ __forceinline__ void start_rows(const PlanDispatch& p, const PlanSizes& sizes, int64_t begin, int64_t end,
                                           int32_t* next, int32_t* warp_sums) {
  for (int i = threadIdx.x; i < kPlanWarps * sizes.num_experts; i += kPlanThreads) next[i] = 0;
  __syncthreads();
  int32_t* own_counts = next + threadIdx.x / kWarpSize * sizes.num_experts;
  count_slots(static_cast<const Id*>(p.experts), begin, end, sizes, own_counts);
  __syncthreads();
  int32_t carried = 0;
  for (int first = 0; first < sizes.num_experts; first += kPlanThreads) {
    const int e = first + threadIdx.x;
    int32_t total;
    const int32_t before =
        block_exclusive_scan(e < sizes.num_experts ? __ldg(p.tokens_per_expert + e) : 0, warp_sums, total);
    if (e < sizes.num_experts) {
      if (blockIdx.x == 0) p.offsets[e] = carried + before;
      int32_t row = carried + before + __ldg(p.workspace + e * sizes.num_blocks + blockIdx.x);
#pragma unroll
      for (int w = 0; w < kPlanWarps; ++w) {
        const int32_t count = next[w * sizes.num_experts + e];
        next[w * sizes.num_experts + e] = row;
        row += count;
      }
    }
    carried += total;
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.offsets[sizes.num_experts] = carried;
}

template <class Id>
__global__ void __launch_bounds__(kPlanThreads) place_slots_kernel(PlanDispatch p, PlanSizes sizes) {
  int32_t* next = static_cast<int32_t*>(shared_memory());  // (kPlanWarps, E), then warp sums (kPlanWarps)
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t begin = int64_t(blockIdx.x) * kSlotsPerBlock + warp * kSlotsPerWarp;
  const int64_t end = begin + kSlotsPerWarp < sizes.num_slots ? begin + kSlotsPerWarp : sizes.num_slots;
  start_rows<Id>(p, sizes, begin, end, next, next + kPlanWarps * sizes.num_experts);
  int32_t* own_next = next + warp * sizes.num_experts;
  for (int64_t first = begin; first < end; first += kWarpSize) {
    const int64_t slot = first + lane;
    const bool exists = slot < end;
    // Lanes past the end share an id of their own, which no slot has.
    const int32_t id = exists ? int32_t(__ldg(static_cast<const Id*>(p.experts) + slot)) : sizes.num_experts;
    const unsigned same = __match_any_sync(kAllLanes, id);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int32_t row = exists ? own_next[id] + rank : 0;
    __syncwarp();
    if (exists && rank == 0) own_next[id] = row + __popc(same);
    __syncwarp();
    if (exists) {
      p.slot_of_row[row] = int32_t(slot);
      p.row_of_slot[slot] = row;
    }
  }
}

}  // namespace k25::cuda
