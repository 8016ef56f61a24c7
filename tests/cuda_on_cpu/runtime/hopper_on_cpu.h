// The wrappers of csrc/common/hopper.cuh for g++: the same names, on the executor.
#pragma once
#include <cuda.h>

#include "bulk_copy.h"
#include "clocks.h"
#include "mbarrier.h"
#include "warp_instructions.h"
#include "wgmma.h"

namespace k25::cuda {

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - cuda_on_cpu::shared_memory());
}

inline uint8_t* aligned_shared_memory() { return cuda_on_cpu::shared_memory(); }

inline void init_mbarrier(uint64_t* b, uint32_t count) { cuda_on_cpu::mbarrier_init(shared_address(b), count); }
inline void fence_mbarrier_init() { cuda_on_cpu::fence_mbarrier_init(); }
inline void arrive(uint64_t* b) { cuda_on_cpu::mbarrier_arrive(shared_address(b)); }
inline void arrive_expecting(uint64_t* b, uint32_t bytes) {
  cuda_on_cpu::mbarrier_arrive_expect_tx(shared_address(b), bytes);
}
inline void wait_for_phase(uint64_t* b, uint32_t parity) {
  cuda_on_cpu::mbarrier_wait_parity(shared_address(b), parity);
}

inline void prefetch_map(const CUtensorMap* map) { cuda_on_cpu::prefetch_tensor_map(reinterpret_cast<uint64_t>(map)); }
inline void load_tile(void* to, const CUtensorMap* map, uint64_t* b, int32_t x, int32_t y) {
  const int32_t start[] = {x, y};
  cuda_on_cpu::bulk_load(shared_address(to), reinterpret_cast<uint64_t>(map), shared_address(b), start, 2, 0);
}
inline void load_tile(void* to, const CUtensorMap* map, uint64_t* b, int32_t x, int32_t y, int32_t z) {
  const int32_t start[] = {x, y, z};
  cuda_on_cpu::bulk_load(shared_address(to), reinterpret_cast<uint64_t>(map), shared_address(b), start, 3, 0);
}
inline void store_tile(const CUtensorMap* map, const void* from, int32_t x, int32_t y) {
  const int32_t start[] = {x, y};
  cuda_on_cpu::bulk_store(reinterpret_cast<uint64_t>(map), shared_address(from), start, 2, 0);
}
inline void add_tile(const CUtensorMap* map, const void* from, int32_t x, int32_t y) {
  const int32_t start[] = {x, y};
  cuda_on_cpu::bulk_add(reinterpret_cast<uint64_t>(map), shared_address(from), start, 2, 0);
}
inline void commit_stores() { cuda_on_cpu::bulk_commit_group(); }
template <int kPending>
void wait_for_stores_to_read() {
  cuda_on_cpu::bulk_wait_group(kPending, true);
}
inline void fence_async_proxy() { cuda_on_cpu::fence_async_proxy(); }

inline void named_barrier(int id, int count) { cuda_on_cpu::block_barrier(id, count); }
inline bool elect_one() {
  uint32_t leader;
  return cuda_on_cpu::elect(~0u, leader);
}
template <int kCount>
void give_registers() {
  cuda_on_cpu::set_max_registers(kCount, false);
}
template <int kCount>
void take_registers() {
  cuda_on_cpu::set_max_registers(kCount, true);
}
inline void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t values[] = {a, b, c, d};
  cuda_on_cpu::store_matrices(shared_address(row), values, 4, false, 0);
}

inline void wgmma_fence() { cuda_on_cpu::wgmma_fence(); }
inline void wgmma_commit() { cuda_on_cpu::wgmma_commit_group(); }
template <int kPending>
void wgmma_wait() {
  cuda_on_cpu::wgmma_wait_group(kPending);
}
template <int kCount>
void hold_accumulators(float (&)[kCount]) {}
template <int kCount>
void run_wgmma(const cuda_on_cpu::WgmmaShape& shape, float (&sums)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  float* registers[kCount];
  for (int i = 0; i < kCount; ++i) registers[i] = &sums[i];
  cuda_on_cpu::wgmma(shape, a, b, accumulate, registers, 0);
}
template <bool kMnMajorA, bool kMnMajorB, int kCount>
void wgmma_bf16(float (&sums)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  run_wgmma({cuda_on_cpu::MmaType::bf16, 2 * kCount, false, false, kMnMajorA, kMnMajorB}, sums, a, b, accumulate);
}
template <int kCount>
void wgmma_e4m3(float (&sums)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  run_wgmma({cuda_on_cpu::MmaType::e4m3, 2 * kCount, false, false, false, false}, sums, a, b, accumulate);
}

}  // namespace k25::cuda
