// Bulk tensor copies between global and shared memory. Eager, they happen when they are issued; lazy, a load happens
// when nothing else can run (its tile holds NaN until then), and a store when a thread waits for its group.
#pragma once
#include <cstdint>

namespace cuda_on_cpu {

void start_block_copies();
// Fails on a copy that nobody waited for.
void finish_block_copies();

// cp.async.bulk.tensor; `start` has as many coordinates as the map has dimensions.
void bulk_load(uint64_t shared, uint64_t map, uint64_t mbarrier, const int32_t* start, int rank, int line);
void bulk_store(uint64_t map, uint64_t shared, const int32_t* start, int rank, int line);
// cp.reduce.async.bulk.tensor.add of f32. Another access to the same place races with it: sums must not depend on
// order.
void bulk_add(uint64_t map, uint64_t shared, const int32_t* start, int rank, int line);

void bulk_commit_group();
// cp.async.bulk.wait_group(.read): all but the latest `pending` groups of the current thread.
void bulk_wait_group(uint32_t pending, bool read_only);

void prefetch_tensor_map(uint64_t map);

// Lets one delayed load happen. False if there is none.
bool complete_one_copy();

}  // namespace cuda_on_cpu
