#include "wgmma.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "counts.h"
#include "cuda_on_cpu.h"
#include "machine.h"
#include "memory.h"
#include "tensor_map.h"

namespace cuda_on_cpu {
namespace {

constexpr int kRows = 64, kMaxN = 256, kMaxRegisters = kMaxN / 2, kDepthBytes = 32;
constexpr uint32_t kWarps = kWarpgroupSize / kWarpSize;
constexpr size_t kMaxInFlight = 64;
const char *const kMma = "wgmma.mma_async of warpgroup", *const kWait = "wgmma.wait_group of warpgroup";

struct Operation {
  WgmmaShape shape;
  uint64_t a, b;
  bool accumulate;
  uint32_t group;
  std::array<std::array<float*, kMaxRegisters>, kWarpgroupSize> registers;
  std::array<std::array<float, kMaxRegisters>, kWarpgroupSize> before;  // accumulators when it was issued
  bool follows;  // an operation in flight writes its accumulators
};

struct Warpgroup {
  Operation next;  // as its threads arrive
  int arrived = 0;
  const char* meets_in = nullptr;  // what those threads execute
  Clock known;                     // to all threads that arrived
  std::vector<Operation> in_flight;
  std::array<uint32_t, kWarpgroupSize> committed{}, waits_for{};
  std::array<bool, kWarpgroupSize> fenced{};
  uint32_t issued = 0, done = 0;  // groups
  uint32_t agents;                // a warp's part in the groups, for each warp
  bool used = false;
  char tag;
};

struct Warpgroups {
  std::array<Warpgroup, kMaxWarpgroups> all;
};

Warpgroups& warpgroups() {
  static auto* instance = new Warpgroups;
  return *instance;
}

Warpgroup& own_warpgroup() {
  const int thread = machine().running, first = thread / kWarpgroupSize * kWarpgroupSize;
  if (first + kWarpgroupSize > machine().num_threads) fail("wgmma: the warpgroup has fewer than 128 threads");
  Warpgroup& w = warpgroups().all[size_t(thread / kWarpgroupSize)];
  if (!w.used) {
    w.used = true;
    w.agents = new_agents("wgmma", kWarps);
    w.in_flight.reserve(kMaxInFlight);
  }
  return w;
}

int rank_in_warpgroup() { return machine().running % kWarpgroupSize; }

// Waits for the other threads of the warpgroup; the last one calls act().
template <class Act>
void meet_warpgroup(Warpgroup& w, const char* what, Act act) {
  if (w.arrived && w.meets_in != what) {
    fail(std::string(what) + " while other threads wait in " + w.meets_in);
  }
  w.meets_in = what;
  release(&w.tag);
  const int first = machine().running / kWarpgroupSize * kWarpgroupSize;
  if (++w.arrived < kWarpgroupSize) {
    wait(what, uint32_t(first / kWarpgroupSize));
  } else {
    w.arrived = 0;
    act();
    for (int i = 0; i < kWarpgroupSize; ++i) {
      if (first + i != machine().running) wake(first + i);
    }
  }
  acquire(&w.tag);
}

// ---- operands in shared memory

struct Descriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t swizzle_bytes;
};

Descriptor decode(uint64_t bits) {
  static constexpr uint32_t kSwizzle[] = {0, 128, 64, 32};
  const Descriptor d{uint32_t(bits & 0x3fff) << 4, uint32_t(bits >> 16 & 0x3fff) << 4,
                     uint32_t(bits >> 32 & 0x3fff) << 4, kSwizzle[bits >> 62]};
  if (bits >> 49 & 7) fail("a wgmma descriptor with a base offset");
  if (bits & ~(0xc000000000000000ull | 0x3fff3fff3fffull)) fail("a wgmma descriptor with unknown bits");
  if (d.swizzle_bytes && d.start >> 7 & (d.swizzle_bytes / 16 - 1)) {
    fail("a wgmma descriptor that starts at byte " + std::to_string(d.start) +
         ", within the repeat of its swizzle, without a base offset");
  }
  return d;
}

// The 16 bytes that hold 8 (or, of e4m3, 16) elements of one row from byte `depth` of K on: K-major.
uint64_t unit_of_row(const Descriptor& d, int row, int depth) {
  const uint32_t r = uint32_t(row), k = uint32_t(depth);
  if (d.swizzle_bytes == 0) return d.start + r / 8 * d.stride + k / 16 * d.leading + r % 8 * 16;
  return swizzled(d.start + r / 8 * d.stride + r % 8 * d.swizzle_bytes + k, d.swizzle_bytes);
}

// The 16 bytes that hold rows row..row+7 at element `k` of K: MN-major, a row of memory for each k.
uint64_t unit_of_column(const Descriptor& d, int row, int k) {
  const uint32_t width = d.swizzle_bytes / 2, r = uint32_t(row), depth = uint32_t(k);
  return swizzled(d.start + r / width * d.leading + depth / 8 * d.stride + depth % 8 * d.swizzle_bytes + r % width * 2,
                  d.swizzle_bytes);
}

float from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  float value = exponent ? std::ldexp(float(8 + fraction), exponent - 10) : std::ldexp(float(fraction), -9);
  if ((bits & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
  return bits & 0x80 ? -value : value;
}

float from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

const std::array<float, 256>& e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> made{};
    for (size_t i = 0; i < made.size(); ++i) made[i] = from_e4m3(uint8_t(i));
    return made;
  }();
  return values;
}

// Calls unit(offset in shared memory, first row, first element of K, whether the unit runs along the rows).
template <class Unit>
void for_each_unit(const WgmmaShape& shape, uint64_t bits, int rows, bool mn_major, Unit unit) {
  const Descriptor d = decode(bits);
  const int element_bytes = shape.type == MmaType::bf16 ? 2 : 1;
  if (mn_major && (element_bytes != 2 || d.swizzle_bytes != 128)) {
    fail("wgmma: MN-major operands are bf16, and known with 128-byte swizzle only");
  }
  if (mn_major) {
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < rows; row += 8) unit(unit_of_column(d, row, k), row, k, true);
    }
    return;
  }
  for (int row = 0; row < rows; ++row) {
    for (int depth = 0; depth < kDepthBytes; depth += 16) {
      unit(unit_of_row(d, row, depth), row, depth / element_bytes, false);
    }
  }
}

// values[k][row], `columns` apart.
void load_operand(const WgmmaShape& shape, uint64_t bits, int rows, bool mn_major, float* values, int columns) {
  for_each_unit(shape, bits, rows, mn_major, [&](uint64_t offset, int row, int k, bool along_rows) {
    const uint8_t* from = shared_memory() + offset;
    if (shape.type == MmaType::e4m3) {
      for (int i = 0; i < 16; ++i) values[(k + i) * columns + row] = e4m3_values()[from[i]];
      return;
    }
    for (int i = 0; i < 8; ++i) {
      uint16_t element;
      std::memcpy(&element, from + 2 * i, sizeof(element));
      values[(along_rows ? k : k + i) * columns + (along_rows ? row + i : row)] = from_bf16(element);
    }
  });
}

// ---- operations

// The accumulator of row r and column c: which thread has it, and which of its registers.
int thread_of(int r, int c) { return r / 16 * 32 + r % 8 * 4 + c / 2 % 4; }
int register_of(int r, int c) { return c / 8 * 4 + r / 8 % 2 * 2 + c % 2; }

void perform(Operation& op) {
  static float a[kDepthBytes * kRows], b[kDepthBytes * kMaxN];
  const int n = op.shape.n, depth = op.shape.type == MmaType::bf16 ? 16 : 32;
  load_operand(op.shape, op.a, kRows, op.shape.mn_major_a, a, kRows);
  load_operand(op.shape, op.b, n, op.shape.mn_major_b, b, kMaxN);
  const float sign = op.shape.negate_a != op.shape.negate_b ? -1.0f : 1.0f;
  for (int r = 0; r < kRows; ++r) {
    float sums[kMaxN] = {};
    for (int k = 0; k < depth; ++k) {
      const float factor = sign * a[k * kRows + r];
      const float* row = b + k * kMaxN;
      for (int c = 0; c < n; ++c) sums[c] += factor * row[c];
    }
    for (int c = 0; c < n; ++c) {
      const size_t thread = size_t(thread_of(r, c)), i = size_t(register_of(r, c));
      float* target = op.registers[thread][i];
      const float before = op.follows ? *target : op.before[thread][i];
      *target = op.accumulate ? before + sums[c] : sums[c];
    }
  }
}

template <class Visit>
void for_each_register(Operation& op, Visit visit) {
  for (size_t t = 0; t < op.registers.size(); ++t) {
    for (size_t i = 0; i < size_t(op.shape.n / 2); ++i) visit(op.registers[t][i], op.before[t][i]);
  }
}

bool same_registers(const Operation& x, const Operation& y) {
  const auto end = std::ptrdiff_t(x.shape.n / 2);
  return x.shape.n == y.shape.n &&
         std::equal(x.registers[0].begin(), x.registers[0].begin() + end, y.registers[0].begin());
}

bool share_registers(const Operation& x, const Operation& y) {
  for (int i = 0; i < x.shape.n / 2; ++i) {
    for (int j = 0; j < y.shape.n / 2; ++j) {
      if (x.registers[0][size_t(i)] == y.registers[0][size_t(j)]) return true;
    }
  }
  return false;
}

void poison(float* target, float&) { *target = std::numeric_limits<float>::quiet_NaN(); }

// Reads of shared memory happen with the group that the operation will be committed to.
void note_reads(const Warpgroup& w, const Operation& op, int line) {
  const AsyncAccess access{Access::read, {w.agents, op.group, kWarps}, &w.known, line};
  const auto note = [&](uint64_t offset, int, int, bool) { async_shared(offset, 16, access); };
  for_each_unit(op.shape, op.a, kRows, op.shape.mn_major_a, note);
  for_each_unit(op.shape, op.b, op.shape.n, op.shape.mn_major_b, note);
}

void issue(Warpgroup& w, int line) {
  Operation& op = w.next;
  op.group = w.committed[0] + 1;
  for (const uint32_t committed : w.committed) {
    if (committed + 1 != op.group) fail("wgmma: the threads of the warpgroup committed different groups");
  }
  w.issued = op.group;
  note_reads(w, op, line);
  op.follows = false;
  for (const Operation& other : w.in_flight) {
    if (same_registers(op, other)) {
      op.follows = true;
    } else if (share_registers(op, other)) {
      fail("wgmma: some of its accumulators belong to another wgmma in flight");
    }
  }
  for_each_register(op, [](float* target, float& before) { before = *target; });
  const bool bf16 = op.shape.type == MmaType::bf16;
  (bf16 ? counts().bf16_flop : counts().e4m3_flop) += 2ull * kRows * uint64_t(op.shape.n) * (bf16 ? 16 : 32);
  if (!machine().options.lazy) {
    perform(op);
    return;
  }
  if (w.in_flight.size() == kMaxInFlight) fail("wgmma: too many in flight");
  for_each_register(op, poison);
  w.in_flight.push_back(op);
}

// What is still in flight behind a performed operation continues from its result, which no one may read yet.
void hand_over(const Operation& performed, std::vector<Operation>::iterator op, std::vector<Operation>::iterator end) {
  for (; op != end; ++op) {
    if (!same_registers(*op, performed)) continue;
    if (!op->follows) return;  // another one of the performed has handed over
    for_each_register(*op, [](float* target, float& before) { before = *target; });
    for_each_register(*op, poison);
    op->follows = false;
    return;
  }
}

void complete_groups(Warpgroup& w, uint32_t last) {
  auto& ops = w.in_flight;
  const auto later = std::find_if(ops.begin(), ops.end(), [&](const Operation& op) { return op.group > last; });
  std::for_each(ops.begin(), later, perform);
  for (auto op = ops.begin(); op != later; ++op) hand_over(*op, later, ops.end());
  ops.erase(ops.begin(), later);
  w.done = std::max(w.done, last);
}

bool same_operation(const Operation& op, const WgmmaShape& shape, uint64_t a, uint64_t b, bool accumulate) {
  return op.a == a && op.b == b && op.accumulate == accumulate && op.shape.type == shape.type &&
         op.shape.n == shape.n && op.shape.negate_a == shape.negate_a && op.shape.negate_b == shape.negate_b &&
         op.shape.mn_major_a == shape.mn_major_a && op.shape.mn_major_b == shape.mn_major_b;
}

}  // namespace

void start_block_wgmma() {
  for (Warpgroup& w : warpgroups().all) {
    w.in_flight.clear();
    w.committed.fill(0);
    w.fenced.fill(false);
    w.arrived = 0;
    w.issued = w.done = 0;
    w.used = false;
  }
}

void finish_block_wgmma() {
  for (const Warpgroup& w : warpgroups().all) {
    if (w.used && w.done < w.issued) {
      fail("the block ended with wgmma groups that nobody waited for");
    }
  }
}

void wgmma_fence() { own_warpgroup().fenced[size_t(rank_in_warpgroup())] = true; }

void wgmma(const WgmmaShape& shape, uint64_t a, uint64_t b, bool accumulate, float* const* registers, int line) {
  Warpgroup& w = own_warpgroup();
  const size_t rank = size_t(rank_in_warpgroup());
  if (!w.fenced[rank]) fail("wgmma.mma_async before any wgmma.fence");
  Operation& op = w.next;
  const int thread = machine().running;
  if (w.arrived == 0) {
    op.shape = shape;
    op.a = a;
    op.b = b;
    op.accumulate = accumulate;
    if (clocks_enabled()) w.known = clock_of(thread);
  } else if (!same_operation(op, shape, a, b, accumulate)) {
    fail("wgmma: the operands differ within the warpgroup");
  }
  if (clocks_enabled()) meet(w.known, clock_of(thread));
  std::copy(registers, registers + shape.n / 2, op.registers[rank].begin());
  meet_warpgroup(w, kMma, [&] { issue(w, line); });
}

void wgmma_commit_group() {
  Warpgroup& w = own_warpgroup();
  ++w.committed[size_t(rank_in_warpgroup())];
}

void wgmma_wait_group(uint32_t pending) {
  Warpgroup& w = own_warpgroup();
  const size_t rank = size_t(rank_in_warpgroup());
  const uint32_t last = w.committed[rank] - std::min(w.committed[rank], pending);
  w.waits_for[rank] = last;
  meet_warpgroup(w, kWait, [&] {
    if (std::any_of(w.waits_for.begin(), w.waits_for.end(), [&](uint32_t other) { return other != last; })) {
      fail("wgmma.wait_group: the threads of the warpgroup wait for different groups");
    }
    complete_groups(w, last);
  });
  if (!clocks_enabled()) return;
  uint32_t& seen = clock_of(machine().running)[w.agents + uint32_t(rank) / kWarpSize];
  seen = std::max(seen, last);
}

}  // namespace cuda_on_cpu
