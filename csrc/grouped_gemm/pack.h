// Rearranging operands into the order in which multiply_tile reads them: for each unit k of the reduction axis, the
// units of the panel's columns side by side, zeros where the matrix ends.
#pragma once
#include "grouped_gemm/math.h"

namespace k25::cpu::K25_ISA {

template <class Math>
constexpr int64_t units_of(int64_t elements) {
  return (elements + Math::kElementsPerUnit - 1) / Math::kElementsPerUnit;
}

constexpr int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
constexpr int64_t at_least(int64_t value, int64_t limit) { return value > limit ? value : limit; }

// Rows of a matrix, or rows of tokens picked through a plan: row m is number slots[m] / top_k, or m without slots. Rows
// are `stride` elements apart, or as far as they are long.
template <class Element>
struct Rows {
  const Element* base;
  int64_t cols;
  const int32_t* slots = nullptr;
  int top_k = 1;
  int64_t stride = cols;
  const Element* operator[](int64_t row) const { return base + (slots ? slots[row] / top_k : row) * stride; }
};

// Columns v * lanes ... of a panel, for each of its vectors: where they start in the matrix and how many exist.
struct PanelColumns {
  int64_t first[kTileVectors];
  int64_t count[kTileVectors];
};

template <class Math>
struct Panels {
  static constexpr int lanes = Tile<Math>::kVectorLanes;

  // Panels of kColumns neighbouring columns.
  static int64_t count(int64_t num_columns) { return (num_columns + Tile<Math>::kColumns - 1) / Tile<Math>::kColumns; }
  static PanelColumns columns(int64_t panel, int64_t num_columns) {
    PanelColumns out;
    for (int v = 0; v < kTileVectors; ++v) {
      out.first[v] = panel * Tile<Math>::kColumns + v * lanes;
      out.count[v] = at_least(0, at_most(lanes, num_columns - out.first[v]));
    }
    return out;
  }

  // Panels of kColumns / 2 gate columns followed by the same columns of up, which lies `width` further.
  static constexpr int kPairs = Tile<Math>::kColumns / 2;
  static int64_t pair_count(int64_t width) { return (width + kPairs - 1) / kPairs; }
  static PanelColumns pair_columns(int64_t panel, int64_t width) {
    PanelColumns out;
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t column = panel * kPairs + (v % (kTileVectors / 2)) * lanes;
      out.first[v] = column + (v < kTileVectors / 2 ? 0 : width);
      out.count[v] = at_least(0, at_most(lanes, width - column));
    }
    return out;
  }
};

// Interleaving lane i of the first half of the rows with lane i of the second half, log2(lanes) times, transposes.
template <class V>
K25_INLINE void transpose(V (&rows)[sizeof(V) / 4]) {
  constexpr int n = sizeof(V) / 4;
  I32V low, high;
  for (int i = 0; i < n; ++i) {
    low[i] = (i & 1) * n + i / 2;
    high[i] = (i & 1) * n + n / 2 + i / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    V next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + n / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// One 32-bit word of each of `lanes` rows, written as one unit of k, or as two where bf16 is widened.
K25_INLINE void put_words(float* to, int64_t, U32V words, const float*) { store(to, words); }
K25_INLINE void put_words(uint32_t* to, int64_t, U32V words, const Bf16*) { store(to, words); }
K25_INLINE void put_words(float* to, int64_t step, U32V words, const Bf16*) {
  store(to, words << 16);
  store(to + step, words & 0xffff0000u);
}

template <class Math>
K25_INLINE typename Math::Unit unit_at(const typename Math::Element* row, int64_t k, int64_t end) {
  if constexpr (Math::kElementsPerUnit == 2) {
    return uint32_t(row[2 * k].bits) | (2 * k + 1 < end ? uint32_t(row[2 * k + 1].bits) << 16 : 0u);
  } else {
    (void)end;
    return load_scalar(row + k);
  }
}

// One vector of a panel of the transpose: the panel's columns are rows of `matrix`, the reduction runs along them.
// Elements [begin, end) of the reduction; begin is a multiple of a unit.
template <class Math>
void pack_transposed(typename Math::Unit* to, const typename Math::Element* matrix, int64_t row_length, int64_t first,
                     int64_t count, int64_t begin, int64_t end) {
  using Unit = typename Math::Unit;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  constexpr int64_t step = Tile<Math>::kColumns;
  const typename Math::Element* rows = matrix + first * row_length + begin;
  const int64_t num_units = units_of<Math>(end - begin);
  int64_t k = 0;
  if constexpr (sizeof(typename Math::Element) <= 4) {
    constexpr int64_t elements = lanes * 4 / int64_t(sizeof(typename Math::Element));  // of a row, in one block
    constexpr int64_t units = elements / Math::kElementsPerUnit;
    for (; count == lanes && (k + units) * Math::kElementsPerUnit <= end - begin; k += units) {
      U32V block[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) block[r] = load<U32V>(rows + r * row_length + k * Math::kElementsPerUnit);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        put_words(to + (k + i * (units / lanes)) * step, step, block[i], matrix);
      }
    }
  }
  for (; k < num_units; ++k) {
    for (int r = 0; r < lanes; ++r) {
      to[k * step + r] = r < count ? unit_at<Math>(rows + r * row_length, k, end - begin) : Unit{};
    }
  }
}

// One row of units for `lanes` columns out of one or two (bf16 pairs) rows of the matrix.
K25_INLINE void put_row(float* to, const float* row, const float*) { store(to, load<F32V>(row)); }
K25_INLINE void put_row(double* to, const double* row, const double*) { store(to, load<F64V>(row)); }
K25_INLINE void put_row(float* to, const Bf16* row, const Bf16*) { store(to, widen(load<U16V>(row))); }
K25_INLINE void put_row(uint32_t* to, const Bf16* row, const Bf16* next) {
  const U32V low = __builtin_convertvector(load<U16V>(row), U32V);
  const U32V high = next ? __builtin_convertvector(load<U16V>(next), U32V) << 16 : U32V{};
  store(to, low | high);
}

// Columns [first, first + count) of rows [begin, end): the reduction runs over the rows. Writes `lanes` units a unit of
// k, `step` apart.
template <class Math>
void pack_rows(typename Math::Unit* to, int64_t step, const Rows<typename Math::Element>& rows, int64_t first,
               int64_t count, int64_t begin, int64_t end) {
  using Element = typename Math::Element;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  constexpr int per_unit = Math::kElementsPerUnit;
  for (int64_t m = begin; m < end; m += per_unit, to += step) {
    const Element* row = rows[m] + first;
    const Element* next = per_unit == 2 && m + 1 < end ? rows[m + 1] + first : nullptr;
    if (count == lanes) {
      put_row(to, row, next);
      continue;
    }
    Element row_copy[lanes] = {}, next_copy[lanes] = {};
    if (count > 0) {
      std::memcpy(row_copy, row, size_t(count) * sizeof(Element));
      if (next) std::memcpy(next_copy, next, size_t(count) * sizeof(Element));
    }
    put_row(to, row_copy, next ? next_copy : nullptr);
  }
}

// The same for a whole panel of kColumns columns, of which `count` exist; each row is read once.
template <class Math>
void pack_row_panel(typename Math::Unit* to, const Rows<typename Math::Element>& rows, int64_t first, int64_t count,
                    int64_t begin, int64_t end) {
  using Element = typename Math::Element;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  constexpr int per_unit = Math::kElementsPerUnit;
  if (count < Tile<Math>::kColumns) {
    for (int64_t v = 0; v < Tile<Math>::kColumns; v += lanes) {
      const int64_t exist = at_least(0, at_most(lanes, count - v));
      pack_rows<Math>(to + v, Tile<Math>::kColumns, rows, exist > 0 ? first + v : 0, exist, begin, end);
    }
    return;
  }
  for (int64_t m = begin; m < end; m += per_unit, to += Tile<Math>::kColumns) {
    const Element* row = rows[m] + first;
    const Element* next = per_unit == 2 && m + 1 < end ? rows[m + 1] + first : nullptr;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) put_row(to + v * lanes, row + v * lanes, next ? next + v * lanes : nullptr);
  }
}

// How far apart pack_tile_rows puts its tiles: the last vector of a tile reaches past it.
template <class Math>
constexpr int64_t tile_stride(int64_t num_units) {
  constexpr int64_t lanes = Tile<Math>::kVectorLanes;
  return num_units * kTileRows + (kTileRows + lanes - 1) / lanes * lanes;
}

// Columns [first, first + count) of rows [begin, end) as tiles of kTileRows columns, in which the units of one k lie
// side by side: what multiply_tile then reads is one stream. Each vector overlaps the next k of its tile, which is
// written after it.
template <class Math>
void pack_tile_rows(typename Math::Unit* to, const Rows<typename Math::Element>& rows, int64_t first, int64_t count,
                    int64_t begin, int64_t end) {
  using Element = typename Math::Element;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  constexpr int per_unit = Math::kElementsPerUnit;
  const int64_t stride = tile_stride<Math>(units_of<Math>(end - begin));
  for (int64_t m = begin; m < end; m += per_unit, to += kTileRows) {
    const Element* row = rows[m] + first;
    const Element* next = per_unit == 2 && m + 1 < end ? rows[m + 1] + first : nullptr;
    for (int64_t column = 0, tile = 0; column < count; column += kTileRows, tile += stride) {
      for (int v = 0; v < kTileRows; v += lanes) {
        const int64_t left = count - column - v;
        if (left >= lanes) {
          put_row(to + tile + v, row + column + v, next ? next + column + v : nullptr);
          continue;
        }
        Element row_copy[lanes] = {}, next_copy[lanes] = {};
        if (left > 0) {
          std::memcpy(row_copy, row + column + v, size_t(left) * sizeof(Element));
          if (next) std::memcpy(next_copy, next + column + v, size_t(left) * sizeof(Element));
        }
        put_row(to + tile + v, row_copy, next ? next_copy : nullptr);
      }
    }
  }
}

// One row of A as units, for where rows cannot be read in place.
template <class Math>
void pack_row(typename Math::Unit* to, const typename Math::Element* row, int64_t begin, int64_t end) {
  const int64_t num_units = units_of<Math>(end - begin);
  for (int64_t k = 0; k < num_units; ++k) to[k] = unit_at<Math>(row + begin, k, end - begin);
}

}  // namespace k25::cpu::K25_ISA
