#include "clocks.h"

#include <algorithm>

#include "executor.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kMaxOtherAgents = 192;

struct Clocks {
  bool enabled = false;
  uint32_t num_threads = 0;
  std::vector<const char*> other_agents;
  std::vector<Clock> of_thread;
  std::vector<std::vector<uint32_t>> fences, init_fences;  // of each thread: its own time at each of them
};

Clocks& clocks() {
  static Clocks instance;
  return instance;
}

void fence(std::vector<std::vector<uint32_t>>& fences) {
  if (!clocks_enabled()) return;
  const int thread = current_thread().linear;
  uint32_t& time = clock_of(thread)[size_t(thread)];
  fences[size_t(thread)].push_back(time++);
}

bool covered(const std::vector<std::vector<uint32_t>>& fences, Event event, const Clock& clock) {
  const auto& times = fences[event.agent];
  const auto first = std::lower_bound(times.begin(), times.end(), event.time);
  return first != times.end() && happened_before({event.agent, *first}, clock);
}

}  // namespace

void start_block_clocks(int num_threads, bool enabled) {
  Clocks& c = clocks();
  c.enabled = enabled;
  if (!enabled) return;
  c.num_threads = uint32_t(num_threads);
  c.other_agents.clear();
  c.of_thread.resize(size_t(num_threads));
  for (size_t i = 0; i < c.of_thread.size(); ++i) {
    c.of_thread[i].assign(c.num_threads + kMaxOtherAgents, 0);
    c.of_thread[i][i] = 1;
  }
  c.fences.assign(size_t(num_threads), {});
  c.init_fences.assign(size_t(num_threads), {});
}

bool clocks_enabled() { return clocks().enabled; }

uint32_t new_agents(const char* what, uint32_t count) {
  Clocks& c = clocks();
  if (!c.enabled) return 0;
  if (c.other_agents.size() + count > kMaxOtherAgents)
    fail("a block uses more mbarriers and bulk groups than are tracked");
  c.other_agents.resize(c.other_agents.size() + count, what);
  return c.num_threads + uint32_t(c.other_agents.size()) - count;
}

const char* agent_name(uint32_t agent) {
  const Clocks& c = clocks();
  return agent < c.num_threads ? nullptr : c.other_agents[agent - c.num_threads];
}

Clock& clock_of(int thread) { return clocks().of_thread[size_t(thread)]; }

Clock empty_clock() { return clocks_enabled() ? Clock(clocks().num_threads + kMaxOtherAgents, 0) : Clock(); }

void join(Clock& into, const Clock& from) {
  if (!clocks_enabled()) return;
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void meet(Clock& into, const Clock& from) {
  if (!clocks_enabled()) return;
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::min(into[i], from[i]);
}

void publish(int thread, Clock& into) {
  if (!clocks_enabled()) return;
  join(into, clock_of(thread));
  ++clock_of(thread)[size_t(thread)];
}

void fence_async_proxy() { fence(clocks().fences); }
void fence_mbarrier_init() { fence(clocks().init_fences); }

bool fenced_before(Event write, const Clock& clock) { return covered(clocks().fences, write, clock); }

bool init_fenced_before(Event init, const Clock& clock) {
  return covered(clocks().init_fences, init, clock) || covered(clocks().fences, init, clock);
}

}  // namespace cuda_on_cpu
