// Both operands of the grouped loops as matrices in memory: packers for gemm.h, tasks over all experts, and the weight
// gradients of all of them.
#pragma once
#include "common/cpu/temporary.h"
#include "grouped_gemm/gemm.h"
#include "grouped_gemm/matrix_sink.h"

namespace k25::cpu::K25_ISA {

// Panels of neighbouring columns of a matrix whose rows are the reduction. Rows lie a power of two apart, so a whole
// block would not fit the cache's sets: it is packed in pieces.
template <class Math>
struct PackColumns {
  using Element = typename Math::Element;
  static constexpr bool kInPieces = true;
  static constexpr int64_t columns = Tile<Math>::kColumns;
  static constexpr int64_t kElementsPerLine = 64 / int64_t(sizeof(Element));
  const Element* matrix;
  int64_t num_columns;

  void operator()(typename Math::Unit* to, int64_t panel, int64_t begin, int64_t end) const {
    pack_row_panel<Math>(to, Rows<Element>{matrix, num_columns}, panel * columns,
                         at_most(columns, num_columns - panel * columns), begin, end);
  }
  static int64_t most_lines(int64_t elements) {
    return elements * ((columns + kElementsPerLine - 1) / kElementsPerLine);
  }
  int64_t lines(const void** to, int64_t panel, int64_t begin, int64_t end) const {
    const void** at = to;
    for (int64_t row = begin; row < end; ++row) {
      const Element* from = matrix + row * num_columns + panel * columns;
      for (int64_t c = 0; c < columns; c += kElementsPerLine) *at++ = from + c;
    }
    return at - to;
  }
};

// Panels whose columns are rows of the matrix: the reduction runs along them.
template <class Math>
struct PackRows {
  using Element = typename Math::Element;
  static constexpr bool kInPieces = false;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  static constexpr int64_t kElementsPerLine = 64 / int64_t(sizeof(Element));
  const Element* matrix;
  int64_t row_length;
  int64_t num_columns;  // of the panels; for gate_up, of the gate
  bool is_gate_up;

  PanelColumns columns_of(int64_t panel) const {
    return is_gate_up ? Panels<Math>::pair_columns(panel, num_columns) : Panels<Math>::columns(panel, num_columns);
  }
  void operator()(typename Math::Unit* to, int64_t panel, int64_t begin, int64_t end) const {
    const PanelColumns at = columns_of(panel);
    for (int v = 0; v < kTileVectors; ++v) {
      pack_transposed<Math>(to + v * lanes, matrix, row_length, at.first[v], at.count[v], begin, end);
    }
  }
  static int64_t most_lines(int64_t elements) {
    return Tile<Math>::kColumns * ((elements + kElementsPerLine - 1) / kElementsPerLine);
  }
  int64_t lines(const void** to, int64_t panel, int64_t begin, int64_t end) const {
    const void** at = to;
    const PanelColumns wanted = columns_of(panel);
    for (int v = 0; v < kTileVectors; ++v) {
      for (int64_t r = 0; r < wanted.count[v]; ++r) {
        const Element* row = matrix + (wanted.first[v] + r) * row_length;
        for (int64_t k = begin; k < end; k += kElementsPerLine) *at++ = row + k;
      }
    }
    return at - to;
  }
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
