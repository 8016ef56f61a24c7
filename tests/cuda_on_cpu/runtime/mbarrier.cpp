#include "mbarrier.h"

#include <array>

#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr int64_t kMaxTransactions = (1 << 20) - 1;
constexpr size_t kMaxMbarriers = 128;
const char* const kWait = "mbarrier.try_wait";

struct Mbarrier {
  bool live = false;
  uint32_t offset, count, pending;
  int64_t transactions;
  uint32_t phase;  // the current one, from 0
  uint32_t agent;
  Event initialized;
  Clock arriving, completed;  // what was published to the current phase, and to all before it
  char tag;
};

struct Mbarriers {
  size_t size = 0;
  std::array<Mbarrier, kMaxMbarriers> all;
  std::array<int16_t, kSharedBytes / 8> at;  // by place, -1 for none
};

Mbarriers& mbarriers() {
  static Mbarriers instance;
  return instance;
}

std::string place(uint64_t offset) { return "the mbarrier at byte " + std::to_string(offset) + " of shared memory"; }

void check_place(uint64_t offset) {
  if (offset % 8 != 0) fail("misaligned: " + place(offset) + " needs 8 bytes");
  if (offset + 8 > shared_bytes()) fail("out of bounds: " + place(offset));
}

Mbarrier& initialized(uint64_t offset, const char* what) {
  check_place(offset);
  const int16_t index = mbarriers().at[offset / 8];
  if (index < 0 || !mbarriers().all[size_t(index)].live) {
    fail(std::string(what) + ": " + place(offset) + " is not initialized");
  }
  return mbarriers().all[size_t(index)];
}

// By a thread to which the initialization is visible.
Mbarrier& visible(uint64_t offset, const char* what) {
  Mbarrier& b = initialized(offset, what);
  if (clocks_enabled() && !happened_before(b.initialized, clock_of(machine().running))) {
    fail(std::string(what) + ": " + place(offset) + " was initialized by thread " +
         std::to_string(b.initialized.agent) + " of the block with no barrier between");
  }
  return b;
}

void complete_phase_if_due(Mbarrier& b) {
  if (b.pending != 0 || b.transactions != 0) return;
  b.pending = b.count;
  ++b.phase;
  join(b.completed, b.arriving);
  if (clocks_enabled()) b.completed[b.agent] = b.phase;
  b.arriving = empty_clock();
  wake_all(kWait, b.offset);
}

void count_transactions(Mbarrier& b, int64_t bytes) {
  b.transactions += bytes;
  if (std::abs(b.transactions) > kMaxTransactions) {
    fail(place(b.offset) + ": its count of bytes leaves its range: " + std::to_string(b.transactions));
  }
}

void arrive(Mbarrier& b, uint32_t count) {
  if (count == 0 || count > b.pending) {
    fail("mbarrier.arrive: " + std::to_string(count) + " arrivals at " + place(b.offset) + ", whose phase " +
         std::to_string(b.phase) + " waits for " + std::to_string(b.pending) + " of " + std::to_string(b.count));
  }
  release(&b.tag);
  publish(machine().running, b.arriving);
  b.pending -= count;
  complete_phase_if_due(b);
}

}  // namespace

void start_block_mbarriers() {
  mbarriers().size = 0;
  mbarriers().at.fill(-1);
}

void mbarrier_init(uint64_t offset, uint32_t count) {
  check_place(offset);
  if (count == 0 || count > kMaxCount) fail("mbarrier.init: a count of " + std::to_string(count));
  Mbarriers& m = mbarriers();
  int16_t& index = m.at[offset / 8];
  if (index < 0) {
    if (m.size == kMaxMbarriers) fail("a block uses more mbarriers than the executor has");
    index = int16_t(m.size++);
    m.all[size_t(index)].agent = new_agents("a bulk copy to shared memory");
    m.all[size_t(index)].phase = 0;
  } else if (m.all[size_t(index)].live) {
    fail("mbarrier.init: " + place(offset) + " is initialized already");
  }
  Mbarrier& b = m.all[size_t(index)];
  b.live = true;
  b.offset = uint32_t(offset);
  b.count = b.pending = count;
  b.transactions = 0;
  b.phase = 0;
  b.arriving = b.completed = empty_clock();
  const int thread = machine().running;
  if (clocks_enabled()) b.initialized = {uint32_t(thread), clock_of(thread)[size_t(thread)]};
  reserve_for_mbarrier(offset, true);
}

void mbarrier_inval(uint64_t offset) {
  visible(offset, "mbarrier.inval").live = false;
  reserve_for_mbarrier(offset, false);
}

void mbarrier_arrive(uint64_t offset, uint32_t count) { arrive(visible(offset, "mbarrier.arrive"), count); }

void mbarrier_arrive_expect_tx(uint64_t offset, uint32_t bytes) {
  Mbarrier& b = visible(offset, "mbarrier.arrive.expect_tx");
  count_transactions(b, bytes);
  arrive(b, 1);
}

bool mbarrier_wait_parity(uint64_t offset, uint32_t parity) {
  Mbarrier& b = visible(offset, kWait);
  if (parity > 1) fail("mbarrier.try_wait.parity: a parity of " + std::to_string(parity));
  while (b.phase % 2 == parity) wait(kWait, uint32_t(offset));
  acquire(&b.tag);
  if (clocks_enabled()) join(clock_of(machine().running), b.completed);
  return true;
}

Event mbarrier_completion(uint64_t offset) {
  const Mbarrier& b = visible(offset, "a bulk copy");
  if (clocks_enabled() && !init_fenced_before(b.initialized, clock_of(machine().running))) {
    fail("a bulk copy: " + place(offset) +
         " was initialized without a fence.mbarrier_init or fence.proxy.async and a barrier between");
  }
  return {b.agent, b.phase + 1};
}

void mbarrier_complete_tx(uint64_t offset, uint32_t bytes, Event completion) {
  Mbarrier& b = initialized(offset, "a bulk copy");
  if (b.phase + 1 != completion.time) {
    fail("a bulk copy: it completes in phase " + std::to_string(b.phase) + ", and was issued in phase " +
         std::to_string(completion.time - 1) + ", of " + place(offset) + ": that phase did not expect its bytes");
  }
  count_transactions(b, -int64_t(bytes));
  complete_phase_if_due(b);
}

std::string describe_mbarrier_wait(const char* what, uint32_t number) {
  if (what != kWait) return "";
  const Mbarrier& b = mbarriers().all[size_t(mbarriers().at[number / 8])];
  return std::string(kWait) + " on " + place(b.offset) + " (phase " + std::to_string(b.phase) + " lacks " +
         std::to_string(b.pending) + " arrivals and " + std::to_string(b.transactions) + " bytes)";
}

}  // namespace cuda_on_cpu
