// The stable counting sort that groups (token, slot) pairs by expert.
#pragma once
#include "common/types.h"

namespace k25 {

struct PlanDispatch {
  const void* experts;  // (T, K) i64 or i32
  bool experts_are_int64;
  int64_t num_tokens, num_experts;
  int top_k;
  int32_t* tokens_per_expert;  // (E)
  int32_t* offsets;            // (E + 1), offsets[0] = 0
  int32_t* slot_of_row;        // (M = T*K): the flat (token * K + k) that row m came from
  int32_t* row_of_slot;        // (T, K): its inverse
  int32_t* workspace;          // CUDA only: plan_dispatch_workspace() entries
};

namespace cpu {
// Throws std::out_of_range for an id outside [0, E), naming token, slot and value.
void plan_dispatch(const PlanDispatch&, int num_threads);
}  // namespace cpu

namespace cuda {
int64_t plan_dispatch_workspace(int64_t num_slots, int64_t num_experts);  // int32 entries
// An id outside [0, E) traps, as torch's own device asserts do.
void plan_dispatch(const PlanDispatch&, Stream);
}  // namespace cuda

}  // namespace k25
