// E4M3 fits in bf16 without rounding, so operands are decoded into the bf16 register tile while they are packed.
#include "common/cpu/e4m3.h"
#include "common/cpu/isa_functions.h"
#include "common/cpu/temporary.h"
#include "fp8_gemm/api.h"
#include "grouped_gemm/gemm.h"

namespace k25::cpu::K25_ISA {
namespace {

using Math = Bf16Math;
using Unit = Math::Unit;
constexpr int lanes = Tile<Math>::kVectorLanes;
constexpr int64_t columns = Tile<Math>::kColumns;
constexpr int64_t kUnits = kFp8Tile / Math::kElementsPerUnit;  // of one row in one tile
constexpr int64_t kDecodedBytes = 64 << 20;                    // of a, at a time
constexpr int64_t kRowsAtOnce = 128 * kTileRows;               // b is decoded again for each
constexpr int64_t kTileUnits = kUnits * columns;               // of b: one tile of the reduction in a panel
constexpr int64_t kTilesAtOnce = at_least(kPanelBytes / (kTileUnits * int64_t(sizeof(Unit))), 1);
static_assert(kFp8Tile % columns == 0, "a panel has one scale of square tiles");

K25_INLINE void put_codes(float* to, U8V codes) { store(to, decode_e4m3(codes)); }
K25_INLINE void put_codes(Bf16* to, U8V codes) { store(to, decode_e4m3_to_bf16(codes)); }

// 128 codes, zeros after the first `count`.
template <class T>
void decode_tile(T* to, const uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < kFp8Tile; i += kLanes) {
    put_codes(to + i, count > i ? load_codes(codes + i, count - i) : U8V{});
  }
}
K25_INLINE void decode_units(float* to, const uint8_t* codes, int64_t count) { decode_tile(to, codes, count); }
K25_INLINE void decode_units(uint32_t* to, const uint8_t* codes, int64_t count) {
  decode_tile(reinterpret_cast<Bf16*>(to), codes, count);
}

// Adds one tile of the reduction, scaled, to the sums of a panel.
struct PromotingSink {
  float* sums;            // (6, columns)
  const float* a_scales;  // of the first row, a_stride apart
  int64_t a_stride;
  const float* b_scales;  // (columns)
  bool first;

  K25_INLINE void put(int row, const F32V (&products)[kTileVectors]) const {
    const float a_scale = a_scales[row * a_stride];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = sums + row * columns + v * lanes;
      const F32V scaled = products[v] * (load<F32V>(b_scales + v * lanes) * a_scale);
      store(to, first ? scaled : load<F32V>(to) + scaled);
    }
  }
};

// What of the operands one group multiplies.
struct Group {
  int64_t row_begin, row_end, tile_begin, tile_end;
  const uint8_t* b;
  const float* b_scales;
  int64_t out_row;  // row of `out` that row_begin goes to
};

struct Gemm {
  const Fp8Gemm& p;
  int64_t chunk_begin, chunk_end;  // rows of a that are decoded
  const Unit* decoded;             // tile after tile, (rows, kUnits) each

  const Unit* decoded_row(int64_t tile, int64_t row) const {
    return decoded + (tile * (chunk_end - chunk_begin) + row - chunk_begin) * kUnits;
  }

  int64_t depth_of(int64_t tile) const { return at_most(kFp8Tile, p.k - tile * kFp8Tile); }

  Group group(int64_t g) const {
    const int64_t tiles = fp8_tiles(p.k), begin = p.offsets[g], end = p.offsets[g + 1];
    if (p.grouping == Fp8Grouping::reduction) {
      return {chunk_begin, chunk_end, begin / kFp8Tile, fp8_tiles(end), p.b, p.b_scales, g * p.m + chunk_begin};
    }
    const int64_t first = at_least(begin, chunk_begin), last = at_most(end, chunk_end);
    return {first, last, 0, tiles, p.b + g * p.n * p.k, p.b_scales + g * fp8_tiles(p.n) * tiles, first};
  }

  void pack(Unit* to, float* scales, const Group& g, int64_t tile, int64_t depth, int64_t column, int64_t count) const {
    const int64_t tiles = fp8_tiles(p.k);
    Bf16 block[kFp8Tile * columns];
    if (p.grouping == Fp8Grouping::rows_transposed) {
      for (int64_t k = 0; k < depth; ++k) {
        const uint8_t* codes = g.b + (tile * kFp8Tile + k) * p.n + column;
        for (int64_t c = 0; c < columns; c += kLanes) {
          put_codes(block + k * columns + c, count > c ? load_codes(codes + c, count - c) : U8V{});
        }
      }
      const Rows<Bf16> rows{block, columns};
      for (int v = 0; v < kTileVectors; ++v) pack_rows<Math>(to + v * lanes, columns, rows, v * lanes, lanes, 0, depth);
    } else {
      for (int64_t c = 0; c < columns; ++c) {
        decode_tile(block + c * kFp8Tile, g.b + (column + c) * p.k + tile * kFp8Tile, c < count ? depth : 0);
      }
      for (int v = 0; v < kTileVectors; ++v) {
        pack_transposed<Math>(to + v * lanes, block, kFp8Tile, v * lanes, lanes, 0, depth);
      }
    }
    for (int64_t c = 0; c < columns; ++c) {
      if (p.grouping == Fp8Grouping::reduction) {
        scales[c] = c < count ? g.b_scales[(column + c) * tiles + tile] : 0;
      } else if (p.grouping == Fp8Grouping::rows) {
        scales[c] = g.b_scales[column / kFp8Tile * tiles + tile];
      } else {
        scales[c] = g.b_scales[tile * fp8_tiles(p.n) + column / kFp8Tile];
      }
    }
  }

  template <class Out>
  void store_rows(const float* sums, int64_t out_row, int64_t rows, int64_t column, int64_t count) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < count; c += lanes) {
        store_partial(static_cast<Out*>(p.out) + (out_row + r) * p.n + column + c, load<F32V>(sums + r * columns + c),
                      count - c);
      }
    }
  }

  // A block of the reduction is packed for all rows, which then take its tiles one after the other, so that the sums of
  // a few rows stay in the first-level cache.
  void panel(const Group& g, int64_t column) const {
    const int64_t count = at_most(columns, p.n - column), tiles = fp8_tiles(p.k);
    auto* packed =
        static_cast<Unit*>(thread_scratch(Scratch::b_pack, kTilesAtOnce * kTileUnits * int64_t(sizeof(Unit))));
    const int64_t kept_rows = g.tile_end - g.tile_begin > kTilesAtOnce ? kRowsAtOnce : kTileRows;
    auto* sums = static_cast<float*>(thread_scratch(Scratch::partial, kept_rows * columns * 4));
    float scales[kTilesAtOnce][columns];
    for (int64_t begin = g.row_begin; begin < g.row_end; begin += kRowsAtOnce) {
      const int64_t rows = at_most(kRowsAtOnce, g.row_end - begin);
      int64_t first = g.tile_begin;
      do {  // once even where the group is empty: its result is zeros
        const int64_t last = at_most(first + kTilesAtOnce, g.tile_end);
        for (int64_t tile = first; tile < last; ++tile) {
          pack(packed + (tile - first) * kTileUnits, scales[tile - first], g, tile, depth_of(tile), column, count);
        }
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const int height = int(at_most(kTileRows, rows - r));
          float* c = sums + (kept_rows == kTileRows ? 0 : r * columns);
          if (first == last) std::memset(c, 0, size_t(height * columns) * 4);
          for (int64_t tile = first; tile < last; ++tile) {
            const Unit* tile_rows[kTileRows];
            for (int i = 0; i < height; ++i) tile_rows[i] = decoded_row(tile, begin + r + i);
            const PromotingSink sink{c, p.a_scales + (begin + r) * tiles + tile, tiles, scales[tile - first],
                                     tile == g.tile_begin};
            multiply_rows<Math, 1>(height, units_of<Math>(depth_of(tile)), tile_rows,
                                   packed + (tile - first) * kTileUnits, sink);
          }
          if (last < g.tile_end) continue;
          const int64_t out_row = g.out_row + begin - g.row_begin + r;
          if (p.out_dtype == DType::bf16) {
            store_rows<Bf16>(c, out_row, height, column, count);
          } else {
            store_rows<float>(c, out_row, height, column, count);
          }
        }
        first = last;
      } while (first < g.tile_end);
    }
  }
};

}  // namespace

void fp8_gemm(const Fp8Gemm& p, int num_threads) {
  const int64_t tiles = fp8_tiles(p.k), panels = Panels<Math>::count(p.n);
  const int64_t row_bytes = at_least(tiles * kUnits * int64_t(sizeof(Unit)), 1);
  const int64_t most = at_least(kDecodedBytes / row_bytes / kTileRows * kTileRows, kRowsAtOnce);
  const Temporary<Unit> decoded(at_most(most, p.m) * tiles * kUnits);
  for (int64_t begin = 0; begin < p.m; begin += most) {
    const Gemm gemm{p, begin, at_most(begin + most, p.m), decoded.get()};
    parallel_ranges(gemm.chunk_end - begin, 16, num_threads, [&](int64_t first, int64_t last) {
      for (int64_t row = begin + first; row < begin + last; ++row) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          decode_units(const_cast<Unit*>(gemm.decoded_row(tile, row)), p.a + row * p.k + tile * kFp8Tile,
                       at_most(kFp8Tile, p.k - tile * kFp8Tile));
        }
      }
    });
    parallel_for(p.num_groups * panels, num_threads, [&](int64_t i) {
      const Group group = gemm.group(i / panels);
      if (group.row_begin < group.row_end) gemm.panel(group, i % panels * columns);
    });
  }
}

}  // namespace k25::cpu::K25_ISA
