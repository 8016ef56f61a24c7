// The two grouped GEMMs of a MoE layer, over the rows that a plan assigns to each expert. The first hands finished
// tiles to epilogue(first_row, num_rows, panel, tile), the tile in the accumulator's type, kColumns a row; the second
// writes them from the registers to where they belong.
#pragma once
#include "common/threads.h"
#include "grouped_gemm/pack.h"

namespace k25::cpu::K25_ISA {

constexpr int64_t kPanelBytes = 128 * 1024;       // a block of a packed panel: stays in the second-level cache
constexpr int64_t kMostUnits = 512;               // summed in one chain, so that f32 keeps its last digits
constexpr int64_t kRowsBytes = 512 * 1024;        // packed rows of A
constexpr int64_t kBlockedRows = 384;             // rows whose partial sums wait while the reduction runs in blocks
constexpr int64_t kTransposedBytes = 256 * 1024;  // packed columns of A: half of a second-level cache

template <class Math>
constexpr int64_t units_per_block() {
  return at_most(kPanelBytes / int64_t(sizeof(typename Math::Unit)) / Tile<Math>::kColumns, kMostUnits);
}

// One stretch of work: an expert and a range of its panels.
struct PanelTask {
  int64_t expert, begin, end;
};

// Splits each expert's panels so that tasks cost about the same. Returns the number of tasks; out may be null.
[[maybe_unused]] static int64_t split_panels(const int32_t* offsets, int64_t num_experts, int64_t num_panels,
                                             bool empty_too, int num_threads, PanelTask* out) {
  const int64_t total = int64_t(offsets[num_experts]) * num_panels;
  const int64_t wanted = num_threads <= 1 ? 1 : 24 * int64_t(num_threads);
  int64_t num_tasks = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e];
    if (rows == 0 && !empty_too) continue;
    const int64_t even = rows == 0 ? num_panels : total / (wanted * rows);
    const int64_t size = num_threads <= 1 ? num_panels : at_least(at_most(even, num_panels), 1);
    for (int64_t p = 0; p < num_panels; p += size) {
      if (out) out[num_tasks] = {e, p, at_most(p + size, num_panels)};
      ++num_tasks;
    }
  }
  return num_tasks;
}

// c = rows(A) @ B for rows [row_begin, row_end) and panels [task.begin, task.end). pack(to, panel, begin, end) packs
// elements [begin, end) of the reduction, unless `kept` holds the expert's panels packed already. pack.lines(to, panel,
// begin, end) lists the cache lines that it will read, at most pack.most_lines(elements) of them: they are asked for
// while the block before is multiplied. With Pack::kInPieces the next block is packed then too, a piece after each
// tile.
template <class Math, class Pack, class Epilogue>
void multiply_expert_rows(const Rows<typename Math::Element>& a, int64_t row_begin, int64_t row_end, int64_t depth,
                          const PanelTask& task, const typename Math::Unit* kept, const Pack& pack,
                          const Epilogue& epilogue) {
  using Unit = typename Math::Unit;
  using Scalar = typename Tile<Math>::Scalar;
  constexpr int64_t columns = Tile<Math>::kColumns;
  constexpr int64_t kLineElements = 64 / int64_t(sizeof(typename Math::Element));
  const int64_t num_units = units_of<Math>(depth);
  const int64_t block = units_per_block<Math>();
  const bool blocked = num_units > block;
  const bool in_place = Math::kReadsRowsInPlace && depth % Math::kElementsPerUnit == 0;
  int64_t chunk = row_end - row_begin;
  if (blocked) chunk = at_most(chunk, kBlockedRows);
  if (!in_place) {
    const int64_t fits = kRowsBytes / int64_t(sizeof(Unit)) / at_least(num_units, 1) / kTileRows * kTileRows;
    chunk = at_most(chunk, at_least(fits, 8 * kTileRows));
  }
  auto** pointers = static_cast<const Unit**>(thread_scratch(Scratch::pointers, chunk * int64_t(sizeof(Unit*))));
  auto* partial = static_cast<Scalar*>(
      thread_scratch(Scratch::partial, (blocked ? chunk : kTileRows) * columns * int64_t(sizeof(Scalar))));
  auto* space = static_cast<Unit*>(thread_scratch(Scratch::b_pack, 2 * kPanelBytes));
  auto* next_space = space + kPanelBytes / int64_t(sizeof(Unit));
  auto* row_space =
      in_place ? nullptr
               : static_cast<Unit*>(thread_scratch(Scratch::a_pack, chunk * num_units * int64_t(sizeof(Unit))));
  const int64_t most_lines = kept ? 0 : pack.most_lines(at_most(block * Math::kElementsPerUnit, depth));
  auto** lines = static_cast<const void**>(thread_scratch(Scratch::lines, most_lines * int64_t(sizeof(void*))));

  for (int64_t first = row_begin; first < row_end; first += chunk) {
    const int64_t rows = at_most(chunk, row_end - first);
    for (int64_t r = 0; r < rows; ++r) {
      pointers[r] = in_place ? reinterpret_cast<const Unit*>(a[first + r]) : row_space + r * num_units;
      if (!in_place) pack_row<Math>(row_space + r * num_units, a[first + r], 0, depth);
    }
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    bool is_packed = kept != nullptr;
    for (int64_t panel = task.begin; panel < task.end; ++panel) {
      int64_t done = 0;
      do {  // once even where depth is 0: the epilogue then sees zeros
        const int64_t units = at_most(block, num_units - done);
        const int64_t end = at_most((done + units) * Math::kElementsPerUnit, depth);
        if (!is_packed) pack(space, panel, done * Math::kElementsPerUnit, end);
        const Unit* b = kept ? kept + (panel * num_units + done) * columns : space;
        const bool panel_ends = done + units == num_units;
        const int64_t next_panel = panel + panel_ends, next_begin = panel_ends ? 0 : end;
        const bool packs_next = !kept && next_panel < task.end;
        const int64_t next_end = packs_next ? at_most(next_begin + block * Math::kElementsPerUnit, depth) : next_begin;
        const int64_t all_lines =
            packs_next && !Pack::kInPieces ? pack.lines(lines, next_panel, next_begin, next_end) : 0;
        const int64_t piece = ((next_end - next_begin) / tiles / kLineElements + 1) * kLineElements;
        for (int64_t r = 0, tile = 0; r < rows; r += kTileRows, ++tile) {
          const int count = int(at_most(kTileRows, rows - r));
          const Unit* tile_rows[kTileRows];
          for (int i = 0; i < count; ++i) tile_rows[i] = pointers[r + i] + done;
          Scalar* c = partial + (blocked ? r * columns : 0);
          const int64_t piece_begin = at_most(next_begin + tile * piece, next_end);
          const int64_t piece_end = at_most(piece_begin + piece, next_end);
          const int64_t line = all_lines * tile / tiles;
          LinesAhead ahead{lines + line, all_lines * (tile + 1) / tiles - line};
          if (Pack::kInPieces && packs_next) ahead.count = pack.lines(lines, next_panel, piece_begin, piece_end);
          multiply_rows<Math, 1>(count, units, tile_rows, b, TileSink<Math>{c, done > 0}, ahead);
          if (panel_ends) epilogue(first + r, count, panel, c);
          if (Pack::kInPieces && piece_begin < piece_end) {
            Unit* to = next_space + (piece_begin - next_begin) / Math::kElementsPerUnit * columns;
            pack(to, next_panel, piece_begin, piece_end);
          }
        }
        if (Pack::kInPieces && packs_next) {
          Unit* packed = next_space;
          next_space = space;
          space = packed;
          is_packed = true;
        }
        done += units;
      } while (done < num_units);
    }
  }
}

// c = A[row_begin:row_end] @ B for a whole B that is packed already, panel after panel. A block of the reduction stays
// in the second-level cache for all panels. sink_at(row, column, valid columns, accumulate) gives the sink of a tile,
// which is written once for each block.
template <class Math, class SinkAt>
void multiply_packed(const Rows<typename Math::Element>& a, int64_t row_begin, int64_t row_end, int64_t depth,
                     int64_t num_columns, const typename Math::Unit* packed, const SinkAt& sink_at) {
  using Unit = typename Math::Unit;
  constexpr int64_t columns = Tile<Math>::kColumns;
  const int64_t num_units = units_of<Math>(depth), block = units_per_block<Math>(), rows = row_end - row_begin;
  const bool in_place = Math::kReadsRowsInPlace && depth % Math::kElementsPerUnit == 0;
  auto** pointers = static_cast<const Unit**>(thread_scratch(Scratch::pointers, rows * int64_t(sizeof(Unit*))));
  auto* space = static_cast<Unit*>(
      thread_scratch(Scratch::a_pack, in_place ? 0 : rows * at_most(block, num_units) * int64_t(sizeof(Unit))));
  for (int64_t done = 0; done == 0 || done < num_units; done += block) {
    const int64_t units = at_most(block, num_units - done);
    const int64_t begin = done * Math::kElementsPerUnit;
    for (int64_t r = 0; r < rows; ++r) {
      if (in_place) {
        pointers[r] = reinterpret_cast<const Unit*>(a[row_begin + r]) + done;
      } else {
        pack_row<Math>(space + r * units, a[row_begin + r], begin,
                       at_most(begin + units * Math::kElementsPerUnit, depth));
        pointers[r] = space + r * units;
      }
    }
    for (int64_t column = 0; column < num_columns; column += columns) {
      const Unit* b = packed + column * num_units + done * columns;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int count = int(at_most(kTileRows, rows - r));
        multiply_rows<Math, 1>(count, units, pointers + r, b,
                               sink_at(row_begin + r, column, at_most(columns, num_columns - column), done > 0));
      }
    }
  }
}

// A part of one expert's weight gradient: all rows (columns of A), some columns (columns of B).
struct WeightGradTask {
  int64_t expert, column_begin, column_end;
};

// c = A^T @ B over the rows [begin, end) of both. sink_at(row, column, valid columns) gives the sink of a tile.
template <class Math, class SinkAt>
void multiply_weight_grad(const Rows<typename Math::Element>& a, const Rows<typename Math::Element>& b, int64_t begin,
                          int64_t end, const WeightGradTask& task, const SinkAt& sink_at) {
  using Unit = typename Math::Unit;
  using Scalar = typename Tile<Math>::Scalar;
  using Vector = typename Math::Vector;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  constexpr int64_t columns = Tile<Math>::kColumns;
  const int64_t depth_block = units_per_block<Math>() * Math::kElementsPerUnit;
  const int64_t stride = tile_stride<Math>(units_of<Math>(at_most(end - begin, depth_block)));
  const int64_t most_rows = at_least(kTransposedBytes / int64_t(sizeof(Unit)) / stride, 8) * kTileRows;
  const int64_t panels = (task.column_end - task.column_begin + columns - 1) / columns;
  const bool blocked = end - begin > depth_block;
  const int64_t rows_at_once = at_most(most_rows, (a.cols + kTileRows - 1) / kTileRows * kTileRows);
  auto* a_space =
      static_cast<Unit*>(thread_scratch(Scratch::a_pack, rows_at_once / kTileRows * stride * int64_t(sizeof(Unit))));
  auto* b_space = static_cast<Unit*>(thread_scratch(Scratch::b_pack, kPanelBytes));
  auto* partial = static_cast<Scalar*>(
      thread_scratch(Scratch::partial, blocked ? rows_at_once * panels * columns * int64_t(sizeof(Scalar)) : 0));

  for (int64_t first = 0; first < a.cols; first += rows_at_once) {
    const int64_t rows = at_most(rows_at_once, a.cols - first);
    for (int64_t from = begin; from < end; from += depth_block) {
      const int64_t to = at_most(from + depth_block, end);
      const int64_t units = units_of<Math>(to - from);
      pack_tile_rows<Math>(a_space, a, first, rows, from, to);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t column = task.column_begin + p * columns;
        for (int v = 0; v < kTileVectors; ++v) {
          const int64_t count = at_least(0, at_most(lanes, task.column_end - column - v * lanes));
          pack_rows<Math>(b_space + v * lanes, columns, b, count > 0 ? column + v * lanes : 0, count, from, to);
        }
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const int count = int(at_most(kTileRows, rows - r));
          const Unit* tile = a_space + r / kTileRows * tile_stride<Math>(units);
          const Unit* tile_rows[kTileRows];
          for (int i = 0; i < count; ++i) tile_rows[i] = tile + i;
          const auto sink = sink_at(first + r, column, at_most(columns, task.column_end - column));
          if (!blocked) {
            multiply_rows<Math, kTileRows>(count, units, tile_rows, b_space, sink);
            continue;
          }
          Scalar* c = partial + (p * rows_at_once + r) * columns;
          multiply_rows<Math, kTileRows>(count, units, tile_rows, b_space, TileSink<Math>{c, from > begin});
          for (int i = 0; to == end && i < count; ++i) {
            Vector sums[kTileVectors];
            for (int v = 0; v < kTileVectors; ++v) sums[v] = load<Vector>(c + i * columns + v * lanes);
            sink.put(i, sums);
          }
        }
      }
    }
  }
}

}  // namespace k25::cpu::K25_ISA
