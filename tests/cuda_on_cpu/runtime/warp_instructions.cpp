#include "warp_instructions.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "cuda_on_cpu.h"
#include "machine.h"
#include "memory.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kRegistersOfSm = 65536;
constexpr int kElements = 8;  // of a matrix's row and column

struct Registers {
  std::array<uint32_t, kMaxWarps> of_warp{};  // 0: as launched
};

Registers& registers() {
  static Registers instance;
  return instance;
}

uint8_t* shared_access(uint64_t offset, size_t bytes, Access access, int line) {
  if (machine().options.use_ptx) return shared_memory_at(offset, bytes, access, line);
  if (offset + bytes > shared_bytes()) fail("out of bounds: byte " + std::to_string(offset) + " of shared memory");
  return shared_memory() + offset;
}

// The places of the rows, by lane.
void exchange_rows(const char* what, uint64_t row, uint64_t rows[kWarpSize]) {
  if (row % 16 != 0) fail(std::string(what) + ": misaligned row at byte " + std::to_string(row) + " of shared memory");
  warp_exchange(what, ~0u, row, rows);
}

// Calls element(place, which half of the register) for the two elements of matrix j that this lane has.
template <class Element>
void for_each_element(const uint64_t rows[kWarpSize], int j, bool transposed, Element element) {
  for (int half = 0; half < 2; ++half) {
    const int across = lane() % 4 * 2 + half, down = lane() / 4;
    const int row = transposed ? across : down, column = transposed ? down : across;
    element(rows[j * kElements + row] + uint64_t(column) * 2, half);
  }
}

}  // namespace

void store_matrices(uint64_t row, const uint32_t* values, int count, bool transposed, int line) {
  uint64_t rows[kWarpSize];
  exchange_rows("stmatrix.sync", row, rows);
  for (int j = 0; j < count; ++j) {
    for_each_element(rows, j, transposed, [&](uint64_t place, int half) {
      const auto element = uint16_t(values[j] >> 16 * half);
      std::memcpy(shared_access(place, 2, Access::write, line), &element, 2);
    });
  }
}

void load_matrices(uint64_t row, uint32_t* values, int count, bool transposed, int line) {
  uint64_t rows[kWarpSize];
  exchange_rows("ldmatrix.sync", row, rows);
  for (int j = 0; j < count; ++j) {
    values[j] = 0;
    for_each_element(rows, j, transposed, [&](uint64_t place, int half) {
      uint16_t element;
      std::memcpy(&element, shared_access(place, 2, Access::read, line), 2);
      values[j] |= uint32_t(element) << 16 * half;
    });
  }
}

bool elect(uint32_t mask, uint32_t& leader) {
  uint64_t ignored[kWarpSize];
  warp_exchange("elect.sync", mask, 0, ignored);
  leader = uint32_t(__builtin_ctz(mask));
  return uint32_t(lane()) == leader;
}

void start_block_registers() { registers().of_warp.fill(0); }

void set_max_registers(uint32_t count, bool increase) {
  const std::string what = std::string("setmaxnreg.") + (increase ? "inc " : "dec ") + std::to_string(count);
  if (count % 8 != 0 || count < 24 || count > 256) fail(what + ": a multiple of 8 from 24 to 256 is needed");
  uint64_t counts[kWarpSize];
  warp_exchange("setmaxnreg.sync", ~0u, count, counts);
  if (std::any_of(counts, counts + kWarpSize, [&](uint64_t other) { return other != count; })) {
    fail(what + ": the lanes of the warp ask for different counts");
  }
  uint32_t& current = registers().of_warp[size_t(machine().running / kWarpSize)];
  if (current && (increase ? count < current : count > current)) {
    fail(what + ": the warp has " + std::to_string(current) + " registers");
  }
  current = count;
}

void finish_block_registers() {
  const auto& of_warp = registers().of_warp;
  const int num_threads = machine().num_threads;
  if (std::all_of(of_warp.begin(), of_warp.end(), [](uint32_t count) { return count == 0; })) return;
  uint32_t sum = 0;
  for (int first = 0; first < num_threads; first += kWarpgroupSize) {
    const auto begin = of_warp.begin() + first / kWarpSize, end = begin + kWarpgroupSize / kWarpSize;
    if (std::any_of(begin, end, [&](uint32_t count) { return count != *begin; })) {
      fail("setmaxnreg: the warps of warpgroup " + std::to_string(first / kWarpgroupSize) + " disagree");
    }
    sum += kWarpgroupSize * (*begin ? *begin : kRegistersOfSm / uint32_t(num_threads) / 8 * 8);
  }
  if (sum > kRegistersOfSm) fail("setmaxnreg: the block's warpgroups take " + std::to_string(sum) + " registers");
}

}  // namespace cuda_on_cpu
