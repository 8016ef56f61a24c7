// mbarriers in shared memory. Their state is kept beside it: no other access to their bytes is allowed.
#pragma once
#include <cstdint>
#include <string>

#include "clocks.h"

namespace cuda_on_cpu {

void start_block_mbarriers();

void mbarrier_init(uint64_t offset, uint32_t count);
void mbarrier_inval(uint64_t offset);
void mbarrier_arrive(uint64_t offset, uint32_t count = 1);
void mbarrier_arrive_expect_tx(uint64_t offset, uint32_t bytes);
// mbarrier.try_wait.parity: returns when the phase of that parity has completed, so always true.
bool mbarrier_wait_parity(uint64_t offset, uint32_t parity);

// The completion, on that mbarrier, of an asynchronous copy that the current thread starts: it happens with the
// mbarrier's current phase. Fails unless the mbarrier's initialization is visible to the async proxy.
Event mbarrier_completion(uint64_t offset);
// The bytes of a copy that was to complete as `completion` have arrived.
void mbarrier_complete_tx(uint64_t offset, uint32_t bytes, Event completion);

// "mbarrier.try_wait" and what the mbarrier still waits for; "" for any other wait.
std::string describe_mbarrier_wait(const char* what, uint32_t number);

}  // namespace cuda_on_cpu
