// Memory as the PTX executor sees it: every access is checked against registered buffers (global) or the block's
// allocation (shared), for alignment, for races, and for reads through the read-only path of what the kernel writes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "clocks.h"

namespace cuda_on_cpu {

enum class Access { read, read_only_path, write, atomic };

// Only registered buffers may be accessed.
void register_buffer(const std::string& name, uint64_t address, size_t bytes, bool writable);
void clear_buffers();

// Forgets which threads accessed what: a launch orders everything before it.
void start_launch_memory();
void start_block_memory();

// The host address of `bytes` bytes at a device address, or fail(). `line` is of the PTX file.
uint8_t* global_memory(uint64_t address, size_t bytes, Access access, int line);
uint8_t* shared_memory_at(uint64_t offset, size_t bytes, Access access, int line);
// A generic address: shared memory lies at shared_memory().
uint8_t* generic_memory(uint64_t address, size_t bytes, Access access, int line);

// An access through the async proxy: it happens as `event`, after what is in `known`.
struct AsyncAccess {
  Access access;
  Event event;
  const Clock* known;
  int line;
};
// Checks and notes it; in the source executor only that shared memory is large enough.
void async_shared(uint64_t offset, size_t bytes, const AsyncAccess& access);
void async_global(uint64_t address, size_t bytes, const AsyncAccess& access);

// The 8 bytes of an mbarrier: any other access to them fails.
void reserve_for_mbarrier(uint64_t offset, bool reserved);

}  // namespace cuda_on_cpu
