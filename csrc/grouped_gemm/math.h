// The arithmetic of one GEMM: what a unit of the reduction axis is, and the register tile that multiplies units.
// A unit is what one broadcast reads: a float, a double, or a pair of bf16 that are neighbours along the reduction.
#pragma once
#include "common/cpu/simd.h"

namespace k25::cpu::K25_ISA {

struct F32Math {
  using Element = float;
  using Unit = float;
  using Vector = F32V;
  static constexpr int kElementsPerUnit = 1;
  static constexpr bool kReadsRowsInPlace = true;
  static K25_INLINE Vector multiply_add(Vector sum, Unit a, const Unit* b) { return sum + a * load<Vector>(b); }
};

struct F64Math {
  using Element = double;
  using Unit = double;
  using Vector = F64V;
  static constexpr int kElementsPerUnit = 1;
  static constexpr bool kReadsRowsInPlace = true;
  static K25_INLINE Vector multiply_add(Vector sum, Unit a, const Unit* b) { return sum + a * load<Vector>(b); }
};

#if defined(__AVX512BF16__) || defined(K25_EMULATED_BF16)
// Pairs of bf16 in 32 bits, products summed in f32.
struct Bf16Math {
  using Element = Bf16;
  using Unit = uint32_t;
  using Vector = F32V;
  static constexpr int kElementsPerUnit = 2;
  static constexpr bool kReadsRowsInPlace = true;
  static K25_INLINE Vector multiply_add(Vector sum, Unit a, const Unit* b) {
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<U32V>(b), (__m512bh)_mm512_set1_epi32(int(a)));
#else
    const U32V pairs = load<U32V>(b);
    const U32V ones = U32V{} + a;
    sum += (F32V)(pairs << 16) * (F32V)(ones << 16);
    return sum + (F32V)(pairs & 0xffff0000u) * (F32V)(ones & 0xffff0000u);
#endif
  }
};
#else
// Without a bf16 instruction, bf16 is widened to f32 while it is packed.
struct Bf16Math {
  using Element = Bf16;
  using Unit = float;
  using Vector = F32V;
  static constexpr int kElementsPerUnit = 1;
  static constexpr bool kReadsRowsInPlace = false;
  static K25_INLINE Vector multiply_add(Vector sum, Unit a, const Unit* b) { return sum + a * load<Vector>(b); }
};
#endif

// The tile: kTileRows rows by kTileVectors vectors of columns, sized so that accumulators, one row of B and one
// broadcast fill the register file (32 registers with AVX-512, 16 before).
constexpr int kTileRows = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <class Math>
struct Tile {
  using Vector = typename Math::Vector;
  using Scalar = typename Compute<typename Math::Element>::Scalar;
  static constexpr int kVectorLanes = sizeof(Vector) / sizeof(Scalar);
  static constexpr int kColumns = kTileVectors * kVectorLanes;
};

// Writes a tile to memory, or adds it to what lies there, kColumns a row: a long reduction is summed in stretches and
// then loses no more than a short one.
template <class Math>
struct TileSink {
  typename Tile<Math>::Scalar* c;
  bool accumulate;
  K25_INLINE void put(int row, const typename Math::Vector (&sums)[kTileVectors]) const {
    using Vector = typename Math::Vector;
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      auto* to = c + row * Tile<Math>::kColumns + v * Tile<Math>::kVectorLanes;
      store(to, accumulate ? load<Vector>(to) + sums[v] : sums[v]);
    }
  }
};

// Cache lines that a tile asks for while it multiplies, one for each kUnitsPerLine units of its reduction: what is
// packed next then comes from memory in the time of this tile. (All at once they would fill the miss buffers and stall
// it.)
struct LinesAhead {
  static constexpr int kUnitsPerLine = 2;
  const void* const* lines = nullptr;
  int64_t count = 0;
};

// a(kRows, num_units) @ b(num_units, kColumns), row by row to sink.put(row, sums). Row r of A has its units at
// a[r] + k * kStep; B holds kColumns units for each k.
template <class Math, int kRows, int kStep, class Sink>
__attribute__((noinline)) void multiply_tile(int64_t num_units, const typename Math::Unit* const* a,
                                             const typename Math::Unit* b, const Sink& sink, LinesAhead ahead = {}) {
  using Vector = typename Math::Vector;
  using Unit = typename Math::Unit;
  constexpr int lanes = Tile<Math>::kVectorLanes;
  Vector sum[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      sum[r][v] = Vector{};
    }
  }
  const Unit* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = a[r];
  const auto step = [&](int64_t k) K25_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Unit unit;
      std::memcpy(&unit, row[r] + k * kStep, sizeof(Unit));  // rows of bf16 may start at an odd element
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Math::multiply_add(sum[r][v], unit, b + v * lanes);
    }
    b += Tile<Math>::kColumns;
  };
  int64_t k = 0;
  for (int64_t i = 0; i < ahead.count && k + LinesAhead::kUnitsPerLine <= num_units; ++i) {
    __builtin_prefetch(ahead.lines[i], 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < LinesAhead::kUnitsPerLine; ++u) step(k++);
  }
#pragma GCC unroll 4
  for (; k < num_units; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sink.put(r, sum[r]);
}

template <class Math, int kStep, class Sink>
void multiply_rows(int num_rows, int64_t num_units, const typename Math::Unit* const* a, const typename Math::Unit* b,
                   const Sink& sink, LinesAhead ahead = {}) {
  switch (num_rows) {
    case 1:
      return multiply_tile<Math, 1, kStep>(num_units, a, b, sink, ahead);
    case 2:
      return multiply_tile<Math, 2, kStep>(num_units, a, b, sink, ahead);
    case 3:
      return multiply_tile<Math, 3, kStep>(num_units, a, b, sink, ahead);
    case 4:
      return multiply_tile<Math, 4, kStep>(num_units, a, b, sink, ahead);
    case 5:
      return multiply_tile<Math, 5, kStep>(num_units, a, b, sink, ahead);
    default:
      return multiply_tile<Math, 6, kStep>(num_units, a, b, sink, ahead);
  }
}

}  // namespace k25::cpu::K25_ISA
