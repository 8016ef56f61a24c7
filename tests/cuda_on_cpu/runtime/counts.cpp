#include "counts.h"

namespace cuda_on_cpu {
namespace {

struct Counters {
  std::map<std::string, Counts> by_symbol;
  Counts none;  // before any launch of PTX
  Counts* current = &none;
};

Counters& counters() {
  static Counters instance;
  return instance;
}

}  // namespace

void start_launch_counts(const std::string& symbol, dim3 grid, dim3 block, size_t shared_bytes) {
  Counts& c = counters().by_symbol[symbol];
  counters().current = &c;
  ++c.launches;
  c.num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  c.num_threads = uint64_t(block.x) * block.y * block.z;
  c.shared_bytes = shared_bytes;
}

Counts& counts() { return *counters().current; }

const std::map<std::string, Counts>& counts_by_symbol() { return counters().by_symbol; }

void clear_counts() {
  counters().by_symbol.clear();
  counters().current = &counters().none;
}

}  // namespace cuda_on_cpu
