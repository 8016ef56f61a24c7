#include <algorithm>

#include "plan_dispatch/kernels.cuh"

namespace k25::cuda {
namespace {

int64_t num_blocks(int64_t num_slots) { return std::max<int64_t>(1, ceil_div(num_slots, kSlotsPerBlock)); }

template <class Id>
void launch(const PlanDispatch& p, Stream stream) {
  const int64_t num_slots = p.num_tokens * p.top_k;
  const PlanSizes sizes{num_slots, num_blocks(num_slots), int(p.num_experts), aligned16(p.experts)};
  const dim3 slot_grid{unsigned(sizes.num_blocks)};
  const size_t counts_bytes = size_t(p.num_experts) * sizeof(int32_t);
  const size_t warp_sums_bytes = kPlanWarps * sizeof(int32_t);
  const auto count = &count_slots_kernel<Id>;
  const auto place = &place_slots_kernel<Id>;
  K25_LAUNCH(count, slot_grid, kPlanThreads, counts_bytes, stream, p, sizes);
  K25_LAUNCH(scan_blocks_kernel, dim3(unsigned(ceil_div(p.num_experts, kPlanWarps))), kPlanThreads, 0, stream, p,
             sizes);
  K25_LAUNCH(place, slot_grid, kPlanThreads, kPlanWarps * counts_bytes + warp_sums_bytes, stream, p, sizes);
}

}  // namespace

int64_t plan_dispatch_workspace(int64_t num_slots, int64_t num_experts) { return num_blocks(num_slots) * num_experts; }

void plan_dispatch(const PlanDispatch& p, Stream stream) {
  if (p.experts_are_int64) return launch<int64_t>(p, stream);
  launch<int32_t>(p, stream);
}

}  // namespace k25::cuda
