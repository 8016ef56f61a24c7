// Both operands of the grouped loops as matrices in memory: packers for gemm.h, tasks over all experts, and the weight
// gradients of all of them.
#pragma once
#include "common/cpu/temporary.h"
#include "grouped_gemm/gemm.h"
#include "grouped_gemm/matrix_sink.h"

namespace k25::cpu::K25_ISA {

// Panels of neighbouring columns of a matrix whose rows are the reduction.
template <class Math>
struct PackColumns {
  using Element = typename Math::Element;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  static constexpr int64_t columns = Tile<Math>::kColumns;
  const Element* matrix;
  int64_t num_columns;

  void operator()(typename Math::Unit* to, int64_t panel, int64_t begin, int64_t end) const {
    const PanelColumns at = Panels<Math>::columns(panel, num_columns);
    const Rows<Element> rows{matrix, num_columns};
    for (int v = 0; v < kTileVectors; ++v) {
      pack_rows<Math>(to + v * lanes, columns, rows, at.count[v] > 0 ? at.first[v] : 0, at.count[v], begin, end);
    }
  }
  // Neighbouring rows lie on different pages: the hardware does not foresee them.
  void prefetch(int64_t panel, int64_t begin, int64_t end) const {
    constexpr int64_t line = 64 / int64_t(sizeof(Element));
    for (int64_t row = begin; row < end; ++row) {
      const Element* from = matrix + row * num_columns + panel * columns;
      for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(from + c, 0, 2);
    }
  }
};

// Panels whose columns are rows of the matrix: the reduction runs along them.
template <class Math>
struct PackRows {
  using Element = typename Math::Element;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  const Element* matrix;
  int64_t row_length;
  int64_t num_columns;  // of the panels; for gate_up, of the gate
  bool is_gate_up;

  void operator()(typename Math::Unit* to, int64_t panel, int64_t begin, int64_t end) const {
    const PanelColumns at =
        is_gate_up ? Panels<Math>::pair_columns(panel, num_columns) : Panels<Math>::columns(panel, num_columns);
    for (int v = 0; v < kTileVectors; ++v) {
      pack_transposed<Math>(to + v * lanes, matrix, row_length, at.first[v], at.count[v], begin, end);
    }
  }
  void prefetch(int64_t, int64_t, int64_t) const {}  // long runs: the hardware does
};

template <class Body>
void for_each_panel_task(const int32_t* offsets, int64_t num_experts, int64_t panels, int num_threads,
                         const Body& body) {
  const int64_t count = split_panels(offsets, num_experts, panels, false, num_threads, nullptr);
  const Temporary<PanelTask> tasks(count);
  split_panels(offsets, num_experts, panels, false, num_threads, tasks.get());
  parallel_for(count, num_threads, [&](int64_t i) { body(tasks.get()[i]); });
}

// A tile of multiply_expert_rows, times `scale_of(row)`, to its place in `out`.
template <class Math, class ScaleOf>
void store_tile(typename Math::Element* out, int64_t row_length, int64_t row, int count, int64_t panel,
                const typename Tile<Math>::Scalar* c, const ScaleOf& scale_of) {
  using Vector = typename Math::Vector;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  const PanelColumns at = Panels<Math>::columns(panel, row_length);
  for (int r = 0; r < count; ++r, c += Tile<Math>::kColumns) {
    const typename Tile<Math>::Scalar scale = scale_of(row + r);
    for (int v = 0; v < kTileVectors; ++v) {
      if (at.count[v] == 0) continue;
      store_partial(out + (row + r) * row_length + at.first[v], load<Vector>(c + v * lanes) * scale, at.count[v]);
    }
  }
}

constexpr int64_t kSharedColumns = 256;  // of one expert's weight gradient, in one task of several threads

// One weight's gradient, (E, rows, cols): rows are columns of `a`, cols columns of `b`.
template <class Math, class Grad>
void multiply_weight_grads(const Rows<typename Math::Element>& a, const Rows<typename Math::Element>& b,
                           const int32_t* offsets, int64_t num_experts, bool accumulate, Grad* out, int num_threads) {
  const int64_t rows = a.cols, cols = b.cols;
  const int64_t most_columns = num_threads <= 1 ? at_least(cols, 1) : kSharedColumns;
  const int64_t column_blocks = (cols + most_columns - 1) / most_columns;
  parallel_for(num_experts * column_blocks, num_threads, [&](int64_t i) {
    const int64_t expert = i / column_blocks, column = i % column_blocks * most_columns;
    const WeightGradTask task{expert, column, at_most(column + most_columns, cols)};
    Grad* matrix = out + expert * rows * cols;
    const int64_t begin = offsets[expert], end = offsets[expert + 1];
    if (begin == end && !accumulate) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memset(matrix + r * cols + column, 0, size_t(task.column_end - column) * sizeof(Grad));
      }
    }
    multiply_weight_grad<Math>(a, b, begin, end, task, [&](int64_t row, int64_t column, int64_t valid) {
      return matrix_sink<Math>(matrix, cols, row, column, valid, accumulate);
    });
    stream_fence();
  });
}

}  // namespace k25::cpu::K25_ISA
