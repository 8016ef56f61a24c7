// Fibers and their scheduler. Never instrumented by ThreadSanitizer: it is told of every
// switch and of what a barrier orders, and must not see the runtime's own data.
#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "bulk_copy.h"
#include "clocks.h"
#include "machine.h"
#include "mbarrier.h"
#include "memory.h"
#include "warp_instructions.h"
#include "wgmma.h"

#if !defined(__x86_64__)
#error "the executor's context switch is written for x86-64"
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
}
#endif

// Saves the callee-saved registers on the current stack, stores its pointer in *save and continues at `to`.
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");
extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(void** save, void* to);

namespace cuda_on_cpu {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(CUDA_ON_CPU_TSAN)
constexpr size_t kStackBytes = 1024 << 10;
#else
constexpr size_t kStackBytes = 512 << 10;
#endif

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

void release(void* tag) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_release(tag);
#else
  (void)tag;
#endif
}

void acquire(void* tag) {
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_acquire(tag);
#else
  (void)tag;
#endif
}

namespace {

void switch_to_main(Machine& m) {
  Fiber& self = m.fibers[m.running];
#if defined(__SANITIZE_ADDRESS__)
  const bool returns = self.status != Status::done && !m.failed;
  __sanitizer_start_switch_fiber(returns ? &self.asan_fake_stack : nullptr, m.main_stack, m.main_stack_bytes);
#endif
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(m.main_tsan_fiber, 1);
#endif
  cuda_on_cpu_switch(&self.stack_pointer, m.main_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.asan_fake_stack, &m.main_stack, &m.main_stack_bytes);
#endif
}

void switch_to_fiber(Machine& m, int thread) {
  Fiber& fiber = m.fibers[thread];
  m.running = thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.main_fake_stack, fiber.stack, kStackBytes);
#endif
#if defined(CUDA_ON_CPU_TSAN)
  __tsan_switch_to_fiber(fiber.tsan_fiber, 1);
#endif
  cuda_on_cpu_switch(&m.main_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.main_fake_stack, nullptr, nullptr);
#endif
  m.running = kNobody;
}

void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.main_stack, &m.main_stack_bytes);
#endif
  acquire(&m.launch_tag);
  m.body(m.context);
  release(&m.done_tag);
  m.fibers[m.running].status = Status::done;
  switch_to_main(m);
  std::abort();  // a finished fiber is never resumed
}

}  // namespace

void wait(const char* what, uint32_t number) {
  Machine& m = machine();
  Fiber& self = m.fibers[m.running];
  self.status = Status::waiting;
  self.waits_for = what;
  self.waits_for_number = number;
  switch_to_main(m);
}

void wake(int thread) {
  Fiber& fiber = machine().fibers[thread];
  if (fiber.status == Status::waiting) fiber.status = Status::ready;
}

void wake_all(const char* what, uint32_t number) {
  Machine& m = machine();
  for (int i = 0; i < m.num_threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.status == Status::waiting && fiber.waits_for == what && fiber.waits_for_number == number) wake(i);
  }
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", value);
  return text;
}

namespace {

std::string deadlock_report(const Machine& m) {
  std::map<std::string, std::vector<int>> waiting;
  for (int i = 0; i < m.num_threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.status == Status::waiting) {
      const std::string mbarrier = describe_mbarrier_wait(fiber.waits_for, fiber.waits_for_number);
      const std::string other = std::string(fiber.waits_for) + " " + hex(fiber.waits_for_number);
      waiting[mbarrier.empty() ? other : mbarrier].push_back(i);
    }
  }
  std::string report = "deadlock in block " + std::to_string(m.fibers[0].state.block_index) + ":";
  for (const auto& [what, threads] : waiting) {
    report += " " + std::to_string(threads.size()) + " threads (first " + std::to_string(threads[0]) + ") wait at " +
              what + ";";
  }
  return report + " " + std::to_string(m.num_threads - m.num_live) + " exited";
}

void prepare_fiber(Machine& m, int thread) {
  Fiber& fiber = m.fibers[thread];
  if (!fiber.stack) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(stack);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  fiber.status = Status::ready;
  fiber.asan_fake_stack = nullptr;
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#if defined(CUDA_ON_CPU_TSAN)
  if (!fiber.tsan_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);  // as costly as a thread: kept
#endif
}

void prepare_shared_memory(Machine& m) {
#if defined(CUDA_ON_CPU_TSAN)
  // A fresh address for every block: accesses of two blocks to shared memory are no race.
  constexpr size_t kArenas = 4096, kArenaBytes = 256 << 10;
  static auto* pool = static_cast<uint8_t*>(
      mmap(nullptr, kArenas * kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static size_t next = 0;
  m.shared = pool + next++ % kArenas * kArenaBytes;
#else
  if (!m.shared) m.shared = static_cast<uint8_t*>(std::aligned_alloc(1024, (kSharedBytes + 1023) / 1024 * 1024));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.shared, kSharedBytes);
#endif
  std::memset(m.shared, 0xFF, m.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(m.shared + m.shared_bytes, kSharedBytes - m.shared_bytes);
#endif
}

void prepare_block(Machine& m, dim3 grid, dim3 block, uint64_t block_index) {
  prepare_shared_memory(m);
  start_block_clocks(m.num_threads, m.options.use_ptx);
  if (m.options.use_ptx) start_block_memory();
  start_block_barriers();
  start_block_mbarriers();
  start_block_copies();
  start_block_wgmma();
  start_block_registers();
  m.num_live = m.num_threads;
  const dim3 position(unsigned(block_index % grid.x), unsigned(block_index / grid.x % grid.y),
                      unsigned(block_index / grid.x / grid.y));
  for (int i = 0; i < m.num_threads; ++i) {
    prepare_fiber(m, i);
    const unsigned u = unsigned(i);
    const dim3 thread(u % block.x, u / block.x % block.y, u / block.x / block.y);
    m.fibers[i].state = {thread, position, block, grid, i, block_index * uint64_t(m.num_threads) + u, block_index};
  }
  release(&m.launch_tag);
}

void run_block(Machine& m) {
  std::vector<int> order(m.num_threads);
  for (int i = 0; i < m.num_threads; ++i) order[i] = m.options.order == Order::reverse ? m.num_threads - 1 - i : i;
  while (m.num_live > 0) {
    if (m.options.order == Order::random) std::shuffle(order.begin(), order.end(), m.random);
    bool progress = false;
    for (const int thread : order) {
      if (m.fibers[thread].status != Status::ready) continue;
      progress = true;
      switch_to_fiber(m, thread);
      if (m.failed) throw Error(m.failure);
      if (m.fibers[thread].status != Status::done) continue;
      --m.num_live;
      retire_from_barriers();
    }
    if (!progress && !complete_one_copy()) throw Error(m.kernel + ": " + deadlock_report(m));
  }
  finish_block_copies();
  finish_block_wgmma();
  finish_block_registers();
}

}  // namespace

Options& options() { return machine().options; }
const ThreadState& current_thread() { return machine().fibers[machine().running].state; }
const std::string& last_kernel() { return machine().kernel; }
uint8_t* shared_memory() { return machine().shared; }
size_t shared_bytes() { return machine().shared_bytes; }

void fail(const std::string& message) {
  Machine& m = machine();
  if (m.running == kNobody) throw Error(m.kernel + ": " + message);
  const ThreadState& t = current_thread();
  m.failed = true;
  m.failure =
      m.kernel + ", block " + std::to_string(t.block_index) + ", thread " + std::to_string(t.linear) + ": " + message;
  switch_to_main(m);
  std::abort();  // a failed kernel is never resumed
}

void run_grid(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, void* context) {
  Machine& m = machine();
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  if (num_blocks == 0 || num_threads == 0 || num_threads > kMaxThreads || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > kSharedBytes) {
    throw Error(kernel + ": invalid launch: grid (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                std::to_string(grid.z) + "), " + std::to_string(num_threads) + " threads a block, " +
                std::to_string(shared_bytes) + " bytes of shared memory");
  }
  m.kernel = kernel;
  m.body = body;
  m.context = context;
  m.num_threads = int(num_threads);
  m.shared_bytes = shared_bytes;
  m.failed = false;
  m.random.seed(m.options.seed);
  if (m.fibers.size() < num_threads) m.fibers.resize(num_threads);
#if defined(CUDA_ON_CPU_TSAN)
  m.main_tsan_fiber = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> blocks(num_blocks);
  for (uint64_t i = 0; i < num_blocks; ++i) blocks[i] = m.options.order == Order::reverse ? num_blocks - 1 - i : i;
  if (m.options.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (const uint64_t block_index : blocks) {
    prepare_block(m, grid, block, block_index);
    run_block(m);
    acquire(&m.done_tag);  // the next block uses the same stacks
  }
}

}  // namespace cuda_on_cpu
