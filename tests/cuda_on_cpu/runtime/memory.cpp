#include "memory.h"

#include <algorithm>
#include <vector>

#include "executor.h"

namespace cuda_on_cpu {
namespace {

constexpr uint64_t kNone = ~0ull, kMany = ~1ull;
constexpr size_t kGranule = 2;  // bytes that share one record; the smallest element of the kernels

// Who touched a granule last. An access is ordered after another one by the same thread, by a barrier of the block
// between them, or by a warp barrier between them within one warp; else, if one of them writes, they race.
struct Record {
  uint64_t writer = kNone;                                             // thread's index in the grid
  uint64_t reader = kNone, reader_warp = kNone, reader_block = kNone;  // each kMany once there were several
  uint32_t write_block_epoch = 0, write_warp_epoch = 0, read_block_epoch = 0, read_warp_epoch = 0;
  int write_line = 0, read_line = 0;
  bool atomic_write = false;
};

struct Place {
  std::string name;
  uint64_t address;
  size_t bytes;
  bool writable;
  std::vector<Record> records;
};

struct Self {
  uint64_t thread, warp, block;
  uint32_t block_epoch, warp_epoch;
  int threads_per_block;
};

Self self() {
  const ThreadState& t = current_thread();
  const int threads = int(t.block_dim.x * t.block_dim.y * t.block_dim.z);
  const uint64_t warps = uint64_t(threads + kWarpSize - 1) / kWarpSize;
  return {t.grid_index,  t.block_index * warps + uint64_t(t.linear) / kWarpSize,
          t.block_index, block_epoch(),
          warp_epoch(),  threads};
}

uint64_t warp_of(uint64_t thread, const Self& me) {
  const uint64_t threads = uint64_t(me.threads_per_block);
  return thread / threads * ((threads + kWarpSize - 1) / kWarpSize) + thread % threads / kWarpSize;
}

// Whether what that block and warp did then is ordered before what the current thread does now.
bool ordered_before(uint64_t block, uint64_t warp, uint32_t block_epoch_then, uint32_t warp_epoch_then,
                    const Self& me) {
  if (block != me.block) return false;
  if (block_epoch_then != me.block_epoch) return true;
  return warp == me.warp && warp_epoch_then != me.warp_epoch;
}

[[noreturn]] void race(const Place& place, size_t offset, const char* then, uint64_t thread, int line_then,
                       const char* now, int line) {
  const std::string who = thread == kMany ? "several threads" : "thread " + std::to_string(thread) + " of the grid";
  fail("race at byte " + std::to_string(offset) + " of " + place.name + ": " + then + " by " + who + " at PTX line " +
       std::to_string(line_then) + ", " + now + " at line " + std::to_string(line) + ", and no barrier between");
}

void check_against_write(const Place& place, const Record& r, size_t offset, Access access, const Self& me, int line) {
  if (r.writer == kNone) return;
  if (access == Access::read_only_path) {
    fail("ld.global.nc at PTX line " + std::to_string(line) + " of byte " + std::to_string(offset) + " of " +
         place.name + ", which this kernel writes at line " + std::to_string(r.write_line));
  }
  if (r.writer == me.thread || (r.atomic_write && access == Access::atomic)) return;
  const uint64_t block = r.writer / uint64_t(me.threads_per_block);
  if (ordered_before(block, warp_of(r.writer, me), r.write_block_epoch, r.write_warp_epoch, me)) return;
  race(place, offset, "written", r.writer, r.write_line, access == Access::read ? "read" : "written", line);
}

void check_against_read(const Place& place, const Record& r, size_t offset, const Self& me, int line) {
  if (r.reader == kNone || r.reader == me.thread) return;
  if (ordered_before(r.reader_block, r.reader_warp, r.read_block_epoch, r.read_warp_epoch, me)) return;
  race(place, offset, "read", r.reader, r.read_line, "written", line);
}

// Readers that a barrier has ordered before this one are forgotten; the others are kept together.
void note_read(Record& r, const Self& me, int line) {
  const bool alone = r.reader == kNone || r.reader == me.thread ||
                     ordered_before(r.reader_block, r.reader_warp, r.read_block_epoch, r.read_warp_epoch, me);
  r.reader = alone ? me.thread : kMany;
  r.reader_warp = alone || r.reader_warp == me.warp ? me.warp : kMany;
  r.reader_block = alone || r.reader_block == me.block ? me.block : kMany;
  r.read_block_epoch = me.block_epoch;
  r.read_warp_epoch = me.warp_epoch;
  r.read_line = line;
}

void record(Place& place, size_t offset, size_t bytes, Access access, int line) {
  const Self me = self();
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    Record& r = place.records[g];
    check_against_write(place, r, g * kGranule, access, me, line);
    if (access == Access::read || access == Access::read_only_path) {
      note_read(r, me, line);
      continue;
    }
    check_against_read(place, r, g * kGranule, me, line);
    r.writer = me.thread;
    r.write_block_epoch = me.block_epoch;
    r.write_warp_epoch = me.warp_epoch;
    r.write_line = line;
    r.atomic_write = access == Access::atomic;
  }
}

struct Memory {
  std::vector<Place> buffers;  // by rising address
  Place shared{"shared memory", 0, 0, true, {}};
};

Memory& memory() {
  static Memory instance;
  return instance;
}

size_t num_records(size_t bytes) { return (bytes + kGranule - 1) / kGranule; }

const char* name_of(Access access) {
  return access == Access::write ? "store" : access == Access::atomic ? "atomic" : "load";
}

void check_alignment(uint64_t address, size_t bytes, Access access, int line, const std::string& where) {
  if (address % bytes == 0) return;
  fail(std::string("misaligned ") + name_of(access) + " of " + std::to_string(bytes) + " bytes at PTX line " +
       std::to_string(line) + " in " + where);
}

}  // namespace

void register_buffer(const std::string& name, uint64_t address, size_t bytes, bool writable) {
  auto& buffers = memory().buffers;
  const auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                      [](uint64_t value, const Place& place) { return value < place.address; });
  buffers.insert(after, Place{name, address, bytes, writable, {}});
}

void clear_buffers() { memory().buffers.clear(); }

void start_launch_memory() {
  for (Place& place : memory().buffers) {
    if (place.writable) place.records.assign(num_records(place.bytes), Record());
  }
}

void start_block_memory() {
  memory().shared.bytes = shared_bytes();
  memory().shared.records.assign(num_records(shared_bytes()), Record());
}

uint8_t* global_memory(uint64_t address, size_t bytes, Access access, int line) {
  auto& buffers = memory().buffers;
  auto after = std::upper_bound(buffers.begin(), buffers.end(), address,
                                [](uint64_t value, const Place& place) { return value < place.address; });
  const std::string what =
      std::string(name_of(access)) + " of " + std::to_string(bytes) + " bytes at PTX line " + std::to_string(line);
  if (after == buffers.begin()) fail("out of bounds: " + what + " before every buffer");
  Place& place = *--after;
  const uint64_t offset = address - place.address;
  if (offset + bytes > place.bytes) {
    fail("out of bounds: " + what + " at byte " + std::to_string(offset) + " of " + place.name + ", which has " +
         std::to_string(place.bytes));
  }
  if (!place.writable && (access == Access::write || access == Access::atomic)) {
    fail(what + " to " + place.name + ", which is an input");
  }
  check_alignment(address, bytes, access, line, place.name);
  if (place.writable) record(place, offset, bytes, access, line);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* shared_memory_at(uint64_t offset, size_t bytes, Access access, int line) {
  Place& place = memory().shared;
  if (offset + bytes > place.bytes || offset + bytes < offset) {
    fail("out of bounds: " + std::string(name_of(access)) + " of " + std::to_string(bytes) + " bytes at PTX line " +
         std::to_string(line) + " at byte " + std::to_string(offset) + " of shared memory, which has " +
         std::to_string(place.bytes));
  }
  check_alignment(offset, bytes, access, line, place.name);
  record(place, offset, bytes, access, line);
  return shared_memory() + offset;
}

uint8_t* generic_memory(uint64_t address, size_t bytes, Access access, int line) {
  const uint64_t base = reinterpret_cast<uint64_t>(shared_memory());
  if (address >= base && address < base + kSharedBytes) return shared_memory_at(address - base, bytes, access, line);
  return global_memory(address, bytes, access, line);
}

}  // namespace cuda_on_cpu
