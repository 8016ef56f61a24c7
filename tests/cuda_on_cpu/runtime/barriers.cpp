// Barriers of a block and collectives of a warp.
#include <array>
#include <cstring>

#include "clocks.h"
#include "machine.h"

namespace cuda_on_cpu {
namespace {

constexpr int kBarriers = 16;

struct Barrier {
  int count = 0;  // of threads that open it; 0: all that have not exited
  int arrived = 0;
  std::vector<int> waiting;
  Clock clock;
  char tag;
};

struct Warp {
  const char* what = nullptr;  // the collective that lanes wait in
  uint32_t mask = 0, arrived = 0;
  uint64_t values[kWarpSize];
  std::array<std::array<uint64_t, kWarpSize>, 2> results;  // by generation's parity
  uint64_t generation = 0;
  Clock clock;
  char tag;
};

struct Barriers {
  std::array<Barrier, kBarriers> of_block;
  std::array<Warp, kMaxWarps> warps;
};

Barriers& barriers() {
  static Barriers instance;
  return instance;
}

void open(Barrier& barrier) {
  for (const int thread : barrier.waiting) {
    if (clocks_enabled()) join(clock_of(thread), barrier.clock);
    wake(thread);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.clock = empty_clock();
}

bool is_full(const Barrier& barrier) { return barrier.arrived >= (barrier.count ? barrier.count : machine().num_live); }

Barrier& arrive(const char* what, int id, int count) {
  const std::string name = std::string(what) + " " + std::to_string(id);
  if (id < 0 || id >= kBarriers) fail(name + ": there are barriers 0 to 15");
  if (count < 0 || count % kWarpSize != 0 || count > machine().num_threads) {
    fail(name + ": " + std::to_string(count) + " threads, of " + std::to_string(machine().num_threads) +
         " and in whole warps");
  }
  Barrier& barrier = barriers().of_block[id];
  if (barrier.arrived && barrier.count != count) {
    fail(name + " for " + std::to_string(count) + " threads, while others wait there for " +
         std::to_string(barrier.count));
  }
  release(&barrier.tag);
  publish(machine().running, barrier.clock);
  barrier.count = count;
  ++barrier.arrived;
  return barrier;
}

// `orders`: memory accesses before it are visible behind it.
void collective(const char* what, uint32_t mask, uint64_t value, uint64_t values[kWarpSize], bool orders) {
  Machine& m = machine();
  const int thread = m.running, lane = thread % kWarpSize, first = thread - lane;
  Warp& warp = barriers().warps[thread / kWarpSize];
  if (!(mask >> lane & 1))
    fail(std::string(what) + ": lane " + std::to_string(lane) + " is not in its mask " + hex(mask));
  if (warp.arrived && (warp.mask != mask || std::strcmp(warp.what, what) != 0)) {
    fail(std::string(what) + " with mask " + hex(mask) + ", while other lanes of the warp wait at " + warp.what +
         " with mask " + hex(warp.mask));
  }
  for (int i = 0; i < kWarpSize; ++i) {
    const bool exists = first + i < m.num_threads && m.fibers[first + i].status != Status::done;
    if (mask >> i & 1 && !exists) {
      fail(std::string(what) + ": mask " + hex(mask) + " names lane " + std::to_string(i) + ", which has exited");
    }
  }
  release(&warp.tag);
  if (orders) publish(thread, warp.clock);
  warp.what = what;
  warp.mask = mask;
  warp.values[lane] = value;
  warp.arrived |= 1u << lane;
  const uint64_t parity = warp.generation % 2;
  if (warp.arrived == mask) {
    std::memcpy(warp.results[parity].data(), warp.values, sizeof(warp.values));
    warp.arrived = 0;
    ++warp.generation;
    for (int i = 0; i < kWarpSize; ++i) {
      if (!(mask >> i & 1)) continue;
      if (orders && clocks_enabled()) join(clock_of(first + i), warp.clock);
      if (i != lane) wake(first + i);
    }
    if (orders) warp.clock = empty_clock();
  } else {
    wait(what, mask);
  }
  acquire(&warp.tag);
  std::memcpy(values, warp.results[parity].data(), sizeof(warp.values));
}

}  // namespace

void start_block_barriers() {
  for (Barrier& barrier : barriers().of_block) {
    barrier.waiting.clear();
    barrier.waiting.reserve(kMaxThreads);
    barrier.count = barrier.arrived = 0;
    barrier.clock = empty_clock();
  }
  for (Warp& warp : barriers().warps) {
    warp.arrived = 0;
    warp.clock = empty_clock();
  }
}

void retire_from_barriers() {
  for (Barrier& barrier : barriers().of_block) {
    if (barrier.arrived && barrier.count == 0 && is_full(barrier)) open(barrier);
  }
}

void block_barrier(int id, int count) {
  Barrier& barrier = arrive("bar.sync", id, count);
  barrier.waiting.push_back(machine().running);
  if (is_full(barrier)) {
    open(barrier);
  } else {
    wait("bar.sync", uint32_t(id));
  }
  acquire(&barrier.tag);
}

void block_arrive(int id, int count) {
  if (count == 0) fail("bar.arrive needs a count of threads");
  Barrier& barrier = arrive("bar.arrive", id, count);
  if (is_full(barrier)) open(barrier);
}

void warp_exchange(const char* what, uint32_t mask, uint64_t value, uint64_t values[kWarpSize]) {
  collective(what, mask, value, values, false);
}

void warp_barrier(uint32_t mask) {
  uint64_t ignored[kWarpSize];
  collective("bar.warp.sync", mask, 0, ignored, true);
}

}  // namespace cuda_on_cpu
