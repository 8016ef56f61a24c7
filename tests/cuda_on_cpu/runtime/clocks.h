// What happened before what within a block, as vector clocks. An agent is a thread, or a sequence of asynchronous
// operations that complete in order: the phases of an mbarrier, a warp's part of wgmma groups, a thread's bulk groups.
// clock[a] >= t says that what agent a did at time t is visible here. Barriers, mbarriers, warp barriers and the waits
// for asynchronous groups join clocks; shuffles do not.
#pragma once
#include <cstdint>
#include <vector>

namespace cuda_on_cpu {

using Clock = std::vector<uint32_t>;

// What an agent did at a time; with a span, what that many agents from this one on did together.
struct Event {
  uint32_t agent = 0, time = 0, span = 1;
};

// Without clocks (source executor) every function here does nothing.
void start_block_clocks(int num_threads, bool enabled);
bool clocks_enabled();

// The first of `count` agents other than threads; `what` is for messages.
uint32_t new_agents(const char* what, uint32_t count = 1);
const char* agent_name(uint32_t agent);  // null for a thread

Clock& clock_of(int thread);
Clock empty_clock();
void join(Clock& into, const Clock& from);
// Lowers `into` to what both know.
void meet(Clock& into, const Clock& from);

// Adds what the thread knows to `into`; what it does from now on is not part of that.
void publish(int thread, Clock& into);

inline bool happened_before(Event event, const Clock& clock) {
  for (uint32_t i = 0; i < event.span; ++i) {
    if (clock[event.agent + i] < event.time) return false;
  }
  return true;
}

// fence.proxy.async and fence.mbarrier_init by the current thread.
void fence_async_proxy();
void fence_mbarrier_init();
// Whether the thread fenced after `write`, and the fence happened before `clock`.
bool fenced_before(Event write, const Clock& clock);
bool init_fenced_before(Event init, const Clock& clock);

}  // namespace cuda_on_cpu
