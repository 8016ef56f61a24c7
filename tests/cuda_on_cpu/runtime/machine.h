// The running block as the runtime's own files see it: its fibers, and how one waits and another wakes it.
#pragma once
#include <random>
#include <string>
#include <vector>

#include "executor.h"

namespace cuda_on_cpu {

constexpr int kNobody = -1;
constexpr int kWarpgroupSize = 128;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMaxWarpgroups = kMaxThreads / kWarpgroupSize;

enum class Status { ready, waiting, done };

struct Fiber {
  ThreadState state;
  Status status;
  const char* waits_for;  // with the barrier's number, the collective's mask or the mbarrier's place
  uint32_t waits_for_number;
  char* stack = nullptr;
  void* stack_pointer;
  void* asan_fake_stack;
  void* tsan_fiber = nullptr;
};

struct Machine {
  Options options;
  std::string kernel;
  std::vector<Fiber> fibers;
  int num_threads = 0, num_live = 0, running = kNobody;
  Body body = nullptr;
  void* context = nullptr;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  bool failed = false;
  std::string failure;
  std::mt19937_64 random;
  void* main_stack_pointer = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void* main_fake_stack = nullptr;
  void* main_tsan_fiber = nullptr;
  char launch_tag, done_tag;
};

Machine& machine();

// Of the running fiber, until wake(). Allocates nothing, as all that runs on a fiber: ThreadSanitizer would take the
// allocator's reuse for a race.
void wait(const char* what, uint32_t number);
void wake(int thread);
// Wakes every thread that waits for `what` with this number.
void wake_all(const char* what, uint32_t number);

// Tells ThreadSanitizer that what came before release(tag) is seen by what follows acquire(tag).
void release(void* tag);
void acquire(void* tag);

std::string hex(uint32_t value);

// barriers.cpp: forgets the last block's barriers; counts a thread that exited as arrived wherever all are waited for.
void start_block_barriers();
void retire_from_barriers();

}  // namespace cuda_on_cpu
