// Writes the rows of a tile straight from the registers to a matrix in memory.
#pragma once
#include "grouped_gemm/math.h"

namespace k25::cpu::K25_ISA {

template <class Math, class Out>
struct MatrixSink {
  using Vector = typename Math::Vector;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  enum class Mode { stream, store, add, edge };
  Out* to;  // the tile's first element
  int64_t row_length, valid;
  Mode mode;
  bool accumulate;

  K25_INLINE void put(int row, const Vector (&sums)[kTileVectors]) const {
    Out* out = to + row * row_length;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v, out += lanes) {
      if (mode == Mode::stream) {
        stream_compute(out, sums[v]);
      } else if (mode == Mode::store) {
        store_compute(out, sums[v]);
      } else if (mode == Mode::add) {
        store_compute(out, load_compute(out) + sums[v]);
      } else if (valid > v * lanes) {
        const int64_t count = valid - v * lanes;
        store_partial(out, accumulate ? load_partial(out, count) + sums[v] : sums[v], count);
      }
    }
  }
};

// For the tile at (row, column), of which `valid` columns exist. Streams where it may; then stream_fence() is needed.
template <class Math, class Out>
MatrixSink<Math, Out> matrix_sink(Out* matrix, int64_t row_length, int64_t row, int64_t column, int64_t valid,
                                  bool accumulate, bool may_stream = true) {
  using Mode = typename MatrixSink<Math, Out>::Mode;
  constexpr int64_t columns = Tile<Math>::kColumns;
  constexpr int64_t line = 64;  // a streamed store must fill its cache line, or it costs more than it saves
  Out* to = matrix + row * row_length + column;
  const bool streams = may_stream && columns * int64_t(sizeof(Out)) % line == 0 &&
                       row_length * int64_t(sizeof(Out)) % line == 0 && reinterpret_cast<uintptr_t>(to) % line == 0;
  const Mode mode = valid < columns ? Mode::edge : accumulate ? Mode::add : streams ? Mode::stream : Mode::store;
  return {to, row_length, valid, mode, accumulate};
}

}  // namespace k25::cpu::K25_ISA
