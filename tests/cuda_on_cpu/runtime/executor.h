// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, blocks run one after another. Barriers and warp
// collectives switch fibers; what a GPU would leave undefined is reported as an Error.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kSharedBytes = 227 << 10;  // of a block, sm_90

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { in_order, reverse, random };

struct Options {
  Order order = Order::in_order;  // of threads in a block, and of blocks in the grid
  uint64_t seed = 0;
  bool use_ptx = false;  // the translated PTX of a kernel, else its source compiled by g++
  bool lazy = false;     // copies and wgmma complete as late as they may, else at once
};

// Valid while a kernel runs.
struct ThreadState {
  dim3 thread, block, block_dim, grid_dim;
  int linear;           // thread's index in its block
  uint64_t grid_index;  // thread's index in the grid, and which block
  uint64_t block_index;
};

Options& options();
const ThreadState& current_thread();

// The running block's shared memory, filled with NaN (0xFF) when the block starts.
uint8_t* shared_memory();
size_t shared_bytes();

// Ends the running kernel; launch() then throws Error with this message, the kernel's name and the thread.
[[noreturn]] void fail(const std::string& message);

using Body = void (*)(void* context);

// Runs body(context) once for each thread of the grid. Throws Error.
void run_grid(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes, Body body, void* context);

// The name of the kernel that was launched last.
const std::string& last_kernel();

// bar.sync `id`: waits until `count` threads have arrived, or (0) every thread of the block that has not exited.
void block_barrier(int id, int count = 0);
// bar.arrive: counts as arrived, and goes on.
void block_arrive(int id, int count);

// Gives each lane in `mask` the values of all lanes in it. `what` must be the same in all of them: a lane that is in
// the mask and waits elsewhere, or has exited, is an error.
void warp_exchange(const char* what, uint32_t mask, uint64_t value, uint64_t values[kWarpSize]);

// bar.warp.sync: also orders memory accesses within the warp.
void warp_barrier(uint32_t mask);

}  // namespace cuda_on_cpu
