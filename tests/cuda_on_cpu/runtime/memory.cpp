#include "memory.h"

#include <algorithm>
#include <vector>

#include "counts.h"
#include "executor.h"

namespace cuda_on_cpu {
namespace {

constexpr uint64_t kNone = ~0ull;
constexpr size_t kGranule = 1;  // bytes that share one record; the smallest element of the kernels
constexpr int kReaders = 3;

struct Reader {
  Event event;
  int line;
};

// Who touched a granule last. Two accesses, one of them a write, race unless the first happened before the second
// (clocks.h); accesses of two blocks always do, unless both are atomic. Readers that another one follows are
// forgotten; more than kReaders that do not follow one another are kept in `read_clocks`.
struct Record {
  uint64_t write_block = kNone, read_block = kNone;
  Event write;
  int write_line = 0;
  bool atomic_write = false, async_write = false;
  bool read_by_other_blocks = false;  // than read_block
  bool is_mbarrier = false;
  int num_readers = 0;
  Reader readers[kReaders];
  int read_clock = -1;
};

struct Place {
  std::string name;
  uint64_t address;
  size_t bytes;
  bool writable;
  std::vector<Record> records;
};

// What accesses: a thread, or an operation of the async proxy that it started.
struct Actor {
  Event event;
  const Clock* known;
  uint64_t block;
  uint64_t first_thread;  // of the block, in the grid
  bool is_async;
  Access access;
  int line;
};

struct Memory {
  std::vector<Place> buffers;  // by rising address
  Place shared{"shared memory", 0, 0, true, {}};
  std::vector<Clock> read_clocks;
  uint64_t read_clocks_block = kNone;
};

Memory& memory() {
  static Memory instance;
  return instance;
}

std::string name_of(Event event, uint64_t first_thread) {
  if (const char* name = agent_name(event.agent)) return name;
  return "thread " + std::to_string(first_thread + event.agent) + " of the grid";
}

[[noreturn]] void race(const Place& place, size_t offset, const char* then, const std::string& who, int line_then,
                       const Actor& me) {
  const bool reads = me.access == Access::read || me.access == Access::read_only_path;
  fail("race at byte " + std::to_string(offset) + " of " + place.name + ": " + then + " by " + who + " at PTX line " +
       std::to_string(line_then) + ", " + (reads ? "read" : "written") +
       (me.is_async ? std::string(" by ") + agent_name(me.event.agent) : "") + " at line " + std::to_string(me.line) +
       ", and no barrier between");
}

void check_against_write(const Place& place, const Record& r, size_t offset, const Actor& me) {
  if (r.write_block == kNone) return;
  if (me.access == Access::read_only_path) {
    fail("ld.global.nc at PTX line " + std::to_string(me.line) + " of byte " + std::to_string(offset) + " of " +
         place.name + ", which this kernel writes at line " + std::to_string(r.write_line));
  }
  if (r.atomic_write && me.access == Access::atomic) return;
  if (r.write_block != me.block) {
    const uint64_t threads = me.block ? me.first_thread / me.block : 0;
    const std::string block = "block " + std::to_string(r.write_block);
    race(place, offset, "written", threads ? name_of(r.write, r.write_block * threads) : block, r.write_line, me);
  }
  if (!happened_before(r.write, *me.known)) {
    race(place, offset, "written", name_of(r.write, me.first_thread), r.write_line, me);
  }
  if (me.is_async && !r.async_write && &place == &memory().shared && !fenced_before(r.write, *me.known)) {
    fail("byte " + std::to_string(offset) + " of " + place.name + ", written by " + name_of(r.write, me.first_thread) +
         " at PTX line " + std::to_string(r.write_line) + ", is accessed by " + agent_name(me.event.agent) +
         " at line " + std::to_string(me.line) + " without a fence.proxy.async by the writer and a barrier between");
  }
}

void check_against_reads(const Place& place, const Record& r, size_t offset, const Actor& me) {
  if (r.read_by_other_blocks || (r.read_block != kNone && r.read_block != me.block)) {
    race(place, offset, "read", "a thread of another block", r.num_readers ? r.readers[0].line : 0, me);
  }
  for (int i = 0; i < r.num_readers; ++i) {
    const Reader& reader = r.readers[i];
    if (happened_before(reader.event, *me.known)) continue;
    race(place, offset, "read", name_of(reader.event, me.first_thread), reader.line, me);
  }
  if (r.read_clock < 0) return;
  const Clock& times = memory().read_clocks[size_t(r.read_clock)];
  for (uint32_t agent = 0; agent < times.size(); ++agent) {
    const Event event{agent, times[agent]};
    if (!happened_before(event, *me.known)) race(place, offset, "read", name_of(event, me.first_thread), 0, me);
  }
}

void forget_reads(Record& r) {
  r.num_readers = 0;
  r.read_clock = -1;
}

void note_read(Record& r, const Actor& me) {
  if (r.read_block != me.block) {
    r.read_by_other_blocks |= r.read_block != kNone;
    forget_reads(r);
    r.read_block = me.block;
  }
  for (int i = 0; i < r.num_readers; ++i) {
    Reader& reader = r.readers[i];
    if (!happened_before(reader.event, *me.known) && reader.event.agent != me.event.agent) continue;
    reader = {me.event, me.line};
    return;
  }
  if (r.num_readers < kReaders) {
    r.readers[r.num_readers++] = {me.event, me.line};
    return;
  }
  Memory& m = memory();
  if (m.read_clocks_block != me.block) m.read_clocks.clear();  // those of other blocks are never looked at again
  m.read_clocks_block = me.block;
  if (r.read_clock < 0) {
    r.read_clock = int(m.read_clocks.size());
    m.read_clocks.push_back(empty_clock());
  }
  for (uint32_t i = 0; i < me.event.span; ++i) {
    uint32_t& time = m.read_clocks[size_t(r.read_clock)][me.event.agent + i];
    time = std::max(time, me.event.time);
  }
}

void record(Place& place, size_t offset, size_t bytes, const Actor& me) {
  for (size_t g = offset / kGranule; g <= (offset + bytes - 1) / kGranule; ++g) {
    Record& r = place.records[g];
    if (r.is_mbarrier) {
      fail("an access at PTX line " + std::to_string(me.line) + " to byte " + std::to_string(g * kGranule) + " of " +
           place.name + ", where an mbarrier is");
    }
    check_against_write(place, r, g * kGranule, me);
    if (me.access == Access::read || me.access == Access::read_only_path) {
      note_read(r, me);
      continue;
    }
    check_against_reads(place, r, g * kGranule, me);
    if (r.read_block == me.block) forget_reads(r);
    r.write_block = me.block;
    r.write = me.event;
    r.write_line = me.line;
    r.atomic_write = me.access == Access::atomic;
    r.async_write = me.is_async;
  }
}

Actor current_actor(Access access, int line) {
  const ThreadState& t = current_thread();
  const Clock& known = clock_of(t.linear);
  return {{uint32_t(t.linear), known[size_t(t.linear)]},
          &known,
          t.block_index,
          t.grid_index - uint64_t(t.linear),
          false,
          access,
          line};
}

Actor async_actor(const AsyncAccess& a) {
  const ThreadState& t = current_thread();
  return {a.event, a.known, t.block_index, t.grid_index - uint64_t(t.linear), true, a.access, a.line};
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

Place& find_buffer(uint64_t address, size_t bytes, Access access, int line) {
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
  return place;
}

void check_shared_bounds(uint64_t offset, size_t bytes, Access access, int line) {
  if (offset + bytes <= shared_bytes() && offset + bytes >= offset) return;
  fail("out of bounds: " + std::string(name_of(access)) + " of " + std::to_string(bytes) + " bytes at PTX line " +
       std::to_string(line) + " at byte " + std::to_string(offset) + " of shared memory, which has " +
       std::to_string(shared_bytes()));
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
  memory().read_clocks_block = kNone;
  for (Place& place : memory().buffers) {
    if (place.writable) place.records.assign(num_records(place.bytes), Record());
  }
}

void start_block_memory() {
  memory().shared.bytes = shared_bytes();
  memory().shared.records.assign(num_records(shared_bytes()), Record());
}

uint8_t* global_memory(uint64_t address, size_t bytes, Access access, int line) {
  Place& place = find_buffer(address, bytes, access, line);
  check_alignment(address, bytes, access, line, place.name);
  if (place.writable) record(place, address - place.address, bytes, current_actor(access, line));
  if (access != Access::write) counts().loaded_bytes += bytes;
  if (access == Access::write || access == Access::atomic) counts().stored_bytes += bytes;
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* shared_memory_at(uint64_t offset, size_t bytes, Access access, int line) {
  Place& place = memory().shared;
  check_shared_bounds(offset, bytes, access, line);
  check_alignment(offset, bytes, access, line, place.name);
  record(place, offset, bytes, current_actor(access, line));
  return shared_memory() + offset;
}

uint8_t* generic_memory(uint64_t address, size_t bytes, Access access, int line) {
  const uint64_t base = reinterpret_cast<uint64_t>(shared_memory());
  if (address >= base && address < base + kSharedBytes) return shared_memory_at(address - base, bytes, access, line);
  return global_memory(address, bytes, access, line);
}

void async_shared(uint64_t offset, size_t bytes, const AsyncAccess& access) {
  check_shared_bounds(offset, bytes, access.access, access.line);
  if (clocks_enabled()) record(memory().shared, offset, bytes, async_actor(access));
}

void async_global(uint64_t address, size_t bytes, const AsyncAccess& access) {
  if (!clocks_enabled()) return;
  Place& place = find_buffer(address, bytes, access.access, access.line);
  if (place.writable) record(place, address - place.address, bytes, async_actor(access));
  (access.access == Access::write ? counts().bulk_stored_bytes : counts().bulk_loaded_bytes) += bytes;
}

void reserve_for_mbarrier(uint64_t offset, bool reserved) {
  if (!clocks_enabled()) return;
  auto& records = memory().shared.records;
  for (size_t g = offset / kGranule; g < (offset + 8) / kGranule; ++g) records[g].is_mbarrier = reserved;
}

}  // namespace cuda_on_cpu
