// The choice of a product's tile, by its sizes alone: no device is asked, so that tests/test_gemm_tiles.cpp shows it.
//
// A tile is kTileM rows of one expert by `width` columns of the result; K is walked within it. The persistent blocks,
// one on each multiprocessor, take tiles in waves, so that a product takes
//     waves * time of a tile,   waves = ceil(tiles / multiprocessors),   tiles = row tiles * ceil(columns / width)
// and the width for which that is least is taken. Of the sizes,
// - M enters as the row tiles. How many rows each expert has is known on the device alone; the host takes all experts
// as
//   equal, which is what balanced routing aims at. An expert of 1 to 128 rows costs one row tile: below that the
//   product is bound by the read of the weights, which is the same for every width. Of weight gradients, M is a row of
//   the matrix.
// - N decides how many columns the last tile of a row leaves empty, and how full the last wave is.
// - K stretches the time of every tile alike, and cancels.
// A tile's time is its width, for the tensor cores, and kFixedShare for what does not depend on it: loading kTileM rows
// of A, starting and ending. Ties go to the widest, which loads least. For the experts of K2.5 the choices are the same
// for every share from 32 to 64, and but for one product for 128: how the device balances the two need not be known
// well.
#pragma once
#include <cstdint>
#include <limits>

namespace k25::cuda {

constexpr int kTileM = 128;

// The widths that are compiled: accumulators, and for FP8 as many sums beside them, fill a consumer's registers.
constexpr int kBf16Widths[] = {64, 128, 256};
constexpr int kBf16WeightGradWidths[] = {128, 256};
constexpr int kFp8Widths[] = {64, 128, 192};

struct ProductSizes {
  int64_t rows, columns, num_experts;  // of the result; rows are those of all experts
};

template <int kCount>
int choose_tile_n(const ProductSizes& sizes, const int (&widths)[kCount], int64_t multiprocessors,
                  int64_t fixed_share = 32) {
  const auto tiles_of = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  const int64_t row_tiles = sizes.num_experts * tiles_of(tiles_of(sizes.rows, sizes.num_experts), kTileM);
  int64_t least = std::numeric_limits<int64_t>::max();
  int best = 0;
  for (const int width : widths) {
    const int64_t waves = tiles_of(row_tiles * tiles_of(sizes.columns, width), multiprocessors);
    const int64_t time = waves * (width + fixed_share);
    if (time > least) continue;
    least = time;
    best = width;
  }
  return best;
}

}  // namespace k25::cuda
