#include "bulk_copy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "machine.h"
#include "mbarrier.h"
#include "tensor_map.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kReserved = 256;

struct Load {
  BoxCopy box;
  uint64_t mbarrier;
  Event completion;
};

struct Store {
  BoxCopy box;
  int thread;
  uint32_t group;
  bool adds;
};

void perform(const Store& store) { store.adds ? add_box(store.box) : store_box(store.box); }

// Of one thread. Groups count from 1; group number i happens at time i of the two agents, which a thread that stores
// nothing, and commits and waits with those that do, does not need.
struct StoreGroups {
  int thread;
  uint32_t committed = 0, read = 0;
  bool open = false;  // a store since the last commit
  bool has_agents = false;
  uint32_t reads, writes;
};

struct Copies {
  std::vector<Load> loads;    // delayed ones
  std::vector<Store> stores;  // delayed ones, by rising group for each thread
  std::vector<StoreGroups> groups;
};

Copies& copies() {
  static Copies instance;
  return instance;
}

StoreGroups& groups_of_thread() {
  Copies& c = copies();
  const int thread = machine().running;
  for (StoreGroups& groups : c.groups) {
    if (groups.thread == thread) return groups;
  }
  c.groups.push_back({});
  StoreGroups& groups = c.groups.back();
  groups.thread = thread;
  return groups;
}

BoxCopy box_of(uint64_t shared, uint64_t map, const int32_t* start, int rank) {
  BoxCopy box{tensor_map_at(map), {}, shared};
  if (box.map.rank != uint32_t(rank)) {
    fail("a bulk copy with " + std::to_string(rank) + " coordinates and a tensor map of " +
         std::to_string(box.map.rank) + " dimensions");
  }
  std::memcpy(box.start, start, sizeof(int32_t) * size_t(rank));
  check_box(box);
  return box;
}

void finish(const Load& load) {
  load_box(load.box);
  mbarrier_complete_tx(load.mbarrier, load.box.map.box_bytes(), load.completion);
}

void perform_stores(int thread, uint32_t last_group) {
  auto& stores = copies().stores;
  size_t kept = 0;
  for (size_t i = 0; i < stores.size(); ++i) {
    if (stores[i].thread == thread && stores[i].group <= last_group) {
      perform(stores[i]);
    } else {
      stores[kept++] = stores[i];
    }
  }
  stores.resize(kept);
}

void note_shared(const BoxCopy& box, const AsyncAccess& access) {
  async_shared(box.shared, box.map.box_bytes(), access);
}

const Clock* known_to_thread() { return clocks_enabled() ? &clock_of(machine().running) : nullptr; }

void store_or_add(uint64_t map, uint64_t shared, const int32_t* start, int rank, int line, bool adds) {
  const BoxCopy box = box_of(shared, map, start, rank);
  if (adds && box.map.element_bytes != 4) fail("a bulk copy that adds what is not f32");
  StoreGroups& groups = groups_of_thread();
  if (!groups.has_agents) {
    groups.has_agents = true;
    groups.reads = new_agents("a bulk store from shared memory");
    groups.writes = new_agents("a bulk store to global memory");
  }
  const uint32_t group = groups.committed + 1;
  note_shared(box, {Access::read, {groups.reads, group}, known_to_thread(), line});
  note_box_in_global(box, {Access::write, {groups.writes, group}, known_to_thread(), line});
  groups.open = true;
  const Store store{box, groups.thread, group, adds};
  if (!machine().options.lazy) return perform(store);
  copies().stores.push_back(store);
}

}  // namespace

void start_block_copies() {
  Copies& c = copies();
  c.loads.clear();
  c.stores.clear();
  c.groups.clear();
  c.loads.reserve(kReserved);
  c.stores.reserve(kReserved);
  c.groups.reserve(kMaxThreads);
}

void finish_block_copies() {
  if (!copies().loads.empty()) {
    fail("the block ended with " + std::to_string(copies().loads.size()) + " bulk copies in flight");
  }
  for (const StoreGroups& groups : copies().groups) {
    if (groups.open || groups.read != groups.committed) {
      fail("thread " + std::to_string(groups.thread) +
           " of the block ended while bulk stores may still read shared memory: it did not commit them and wait");
    }
  }
}

void bulk_load(uint64_t shared, uint64_t map, uint64_t mbarrier, const int32_t* start, int rank, int line) {
  const Load load{box_of(shared, map, start, rank), mbarrier, mbarrier_completion(mbarrier)};
  note_shared(load.box, {Access::write, load.completion, known_to_thread(), line});
  note_box_in_global(load.box, {Access::read, load.completion, known_to_thread(), line});
  if (!machine().options.lazy) return finish(load);
  std::memset(shared_memory() + shared, 0xFF, load.box.map.box_bytes());
  copies().loads.push_back(load);
}

void bulk_store(uint64_t map, uint64_t shared, const int32_t* start, int rank, int line) {
  store_or_add(map, shared, start, rank, line, false);
}

void bulk_add(uint64_t map, uint64_t shared, const int32_t* start, int rank, int line) {
  store_or_add(map, shared, start, rank, line, true);
}

void bulk_commit_group() {
  StoreGroups& groups = groups_of_thread();
  ++groups.committed;
  groups.open = false;
}

void bulk_wait_group(uint32_t pending, bool read_only) {
  StoreGroups& groups = groups_of_thread();
  const uint32_t done = groups.committed - std::min(groups.committed, pending);
  perform_stores(groups.thread, done);
  groups.read = std::max(groups.read, done);
  if (!clocks_enabled() || !groups.has_agents) return;
  Clock& clock = clock_of(groups.thread);
  clock[groups.reads] = std::max(clock[groups.reads], done);
  if (!read_only) clock[groups.writes] = std::max(clock[groups.writes], done);
}

void prefetch_tensor_map(uint64_t map) { tensor_map_at(map); }

bool complete_one_copy() {
  auto& loads = copies().loads;
  if (loads.empty()) return false;
  Machine& m = machine();
  const size_t last = loads.size() - 1;
  const size_t chosen = m.options.order == Order::in_order  ? 0
                        : m.options.order == Order::reverse ? last
                                                            : m.random() % loads.size();
  const Load load = loads[chosen];
  loads.erase(loads.begin() + std::ptrdiff_t(chosen));
  finish(load);
  return true;
}

}  // namespace cuda_on_cpu
