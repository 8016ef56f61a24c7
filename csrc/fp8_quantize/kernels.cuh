// Device code of the E4M3 quantiser: a block for a tile of 128 x 128, which passes through shared memory once, so that
// rows, squares and columns (the transposed result) all come from one read of the input.
#pragma once
#include "common/device.cuh"
#include "fp8_quantize/api.h"

namespace k25::cuda {

constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeWarps = kQuantizeThreads / kWarpSize;
constexpr int kPerLane = int(kFp8Tile) / kWarpSize;  // elements of a row, or of a column, of the tile
constexpr int kTileStride = int(kFp8Tile) + 1;       // floats: neighbouring rows start in neighbouring banks
constexpr int kTileFloats = int(kFp8Tile) * kTileStride;
constexpr size_t kQuantizeBytes = (kTileFloats + kQuantizeWarps) * sizeof(float);

#if defined(__CUDACC__)
// Both nearest, ties to even, at most 448; NaN stays NaN. `low` in the low byte.
__device__ __forceinline__ uint32_t to_e4m3_pair(float low, float high) {
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

__device__ __forceinline__ float from_e4m3(uint32_t code) {
  const uint32_t size = code & 0x7fu, sign = (code & 0x80u) << 24;
  uint32_t bits = size < 8 ? __float_as_uint(float(size) * 0.001953125f) : (size << 20) + (120u << 23);
  if (size == 0x7fu) bits = 0x7fc00000u;
  return __uint_as_float(bits | sign);
}

// |x|, or 0 where x is inf or NaN: bits that order as the numbers do.
__device__ __forceinline__ uint32_t finite_bits(float x) {
  const uint32_t size = __float_as_uint(x) & 0x7fffffffu;
  return size < 0x7f800000u ? size : 0u;
}

__device__ __forceinline__ float scale_of(uint32_t largest_bits, bool power_of_two) {
  const float scale = __uint_as_float(largest_bits) / kFp8Max;
  if (!power_of_two || scale == 0.0f) return scale;
  const uint32_t bits = __float_as_uint(scale);
  return __uint_as_float(bits < 0x800000u ? 0x800000u : (bits + 0x7fffffu) & 0xff800000u);
}

__device__ __forceinline__ float to_encode(float x, float scale) {
  const bool finite = (__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u;
  const float value = scale > 0.0f ? x / scale : 0.0f * x;  // keeps the sign of a zero
  return finite ? value : __uint_as_float(0x7fc00000u);
}

// Four neighbours of a line of the result, of which `left` exist: one word where addresses allow.
__device__ __forceinline__ void store_codes(uint8_t* to, const float (&values)[kPerLane], int64_t left, bool words) {
  const uint32_t word = to_e4m3_pair(values[0], values[1]) | to_e4m3_pair(values[2], values[3]) << 16;
  if (words && left >= kPerLane) {
    *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i < left) to[i] = uint8_t(word >> 8 * i);
  }
}

struct TilePlace {
  int64_t batch, row, col, height, width;  // of the tile, and how much of it exists
};

template <class Element, bool kVectorized>
__device__ __forceinline__ void load_tile(const QuantizeFp8& p, const TilePlace& at, float* tile) {
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  constexpr int kPerRow = int(kFp8Tile) / kCount;
  const Element* x = static_cast<const Element*>(p.x) + (at.batch * p.rows + at.row) * p.cols + at.col;
  for (int i = int(threadIdx.x); i < int(kFp8Tile) * kPerRow; i += kQuantizeThreads) {
    const int row = i / kPerRow, col = i % kPerRow * kCount;
    float values[kCount] = {};
    if (row < at.height && col < at.width) load(x + row * p.cols + col, values);
#pragma unroll
    for (int j = 0; j < kCount; ++j) tile[row * kTileStride + col + j] = values[j];
  }
}

// Line `line` of the tile (a row, or a column where `step` is the stride): its four elements of this lane.
__device__ __forceinline__ uint32_t load_line(const float* from, int step, float (&values)[kPerLane]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    values[i] = from[(int(threadIdx.x) % kWarpSize * kPerLane + i) * step];
    const uint32_t bits = finite_bits(values[i]);
    largest = bits > largest ? bits : largest;
  }
  return __reduce_max_sync(kAllLanes, largest);
}

__device__ __forceinline__ uint32_t largest_of_tile(const float* tile, uint32_t* shared) {
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  uint32_t largest = 0;
  for (int row = warp; row < int(kFp8Tile); row += kQuantizeWarps) {
    float values[kPerLane];
    const uint32_t line = load_line(tile + row * kTileStride, 1, values);
    largest = line > largest ? line : largest;
  }
  if (lane == 0) shared[warp] = largest;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < kQuantizeWarps ? shared[lane] : 0u);
}

__device__ __forceinline__ void write_line(float (&values)[kPerLane], float scale, uint8_t* line, int64_t length,
                                           bool words) {
  const int first = int(threadIdx.x) % kWarpSize * kPerLane;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] = to_encode(values[i], scale);
  store_codes(line + first, values, length - first, words);
}

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kQuantizeThreads, 3) quantize_fp8_kernel(QuantizeFp8 p) {
  auto* tile = static_cast<float*>(shared_memory());
  const int64_t row_tiles = fp8_tiles(p.rows), col_tiles = fp8_tiles(p.cols);
  TilePlace at{int64_t(blockIdx.x) / row_tiles, int64_t(blockIdx.x) % row_tiles * kFp8Tile, 0, 0, 0};
  at.height = p.rows - at.row < kFp8Tile ? p.rows - at.row : kFp8Tile;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  for (int64_t t = blockIdx.y; t < col_tiles; t += gridDim.y) {
    at.col = t * kFp8Tile;
    at.width = p.cols - at.col < kFp8Tile ? p.cols - at.col : kFp8Tile;
    __syncthreads();  // the tile before is done with
    load_tile<Element, kVectorized>(p, at, tile);
    __syncthreads();
    float square = 0.0f;
    if (p.square) {
      square = scale_of(largest_of_tile(tile, reinterpret_cast<uint32_t*>(tile + kTileFloats)), p.power_of_two);
      if (threadIdx.x == 0) p.scales[(at.batch * row_tiles + at.row / kFp8Tile) * col_tiles + t] = square;
    }
    for (int row = warp; row < at.height; row += kQuantizeWarps) {
      float values[kPerLane];
      const uint32_t largest = load_line(tile + row * kTileStride, 1, values);
      const float scale = p.square ? square : scale_of(largest, p.power_of_two);
      const int64_t line = at.batch * p.rows + at.row + row;
      if (!p.square && lane == 0) p.scales[line * col_tiles + t] = scale;
      write_line(values, scale, p.values + line * p.cols + at.col, at.width, p.cols % kPerLane == 0);
    }
    if (!p.values_transposed) continue;
    for (int col = warp; col < at.width; col += kQuantizeWarps) {
      float values[kPerLane];
      const float scale = scale_of(load_line(tile + col, kTileStride, values), p.power_of_two);
      const int64_t line = at.batch * p.cols + at.col + col;
      if (lane == 0) p.scales_transposed[line * row_tiles + at.row / kFp8Tile] = scale;
      write_line(values, scale, p.values_transposed + line * p.rows + at.row, at.height, p.rows % kPerLane == 0);
    }
  }
}

constexpr int kTransposeThreads = 256;
constexpr int kWordsPerLine = int(kFp8Tile) / 4;  // of a tile, four codes each
constexpr int kWordStride = kWordsPerLine + 1;    // of the tile in shared memory
constexpr size_t kTransposeBytes = kFp8Tile * kWordStride * sizeof(uint32_t);

// Up to four neighbours, of which `left` exist.
template <bool kWords>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* from, int64_t left) {
  uint32_t word = 0;
  if constexpr (kWords) {
    if (left > 0) word = __ldg(reinterpret_cast<const uint32_t*>(from));
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i < left) word |= uint32_t(__ldg(from + i)) << 8 * i;
    }
  }
  return word;
}

template <bool kWords>
__device__ __forceinline__ void store_word(uint8_t* to, uint32_t word, int64_t left) {
  if constexpr (kWords) {
    if (left > 0) *reinterpret_cast<uint32_t*>(to) = word;
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i < left) to[i] = uint8_t(word >> 8 * i);
    }
  }
}

// A block for a tile. kWords: rows and columns are multiples of four codes, and so are the addresses.
template <bool kWords>
__global__ void __launch_bounds__(kTransposeThreads) transpose_fp8_kernel(TransposeFp8 p) {
  auto* tile = static_cast<uint32_t*>(shared_memory());
  const int64_t row_tiles = fp8_tiles(p.rows), col_tiles = fp8_tiles(p.cols);
  const int64_t batch = int64_t(blockIdx.x) / row_tiles, row_tile = int64_t(blockIdx.x) % row_tiles;
  const int64_t first_row = row_tile * kFp8Tile, height = p.rows - first_row;
  for (int64_t t = blockIdx.y; t < col_tiles; t += gridDim.y) {
    const int64_t first_col = t * kFp8Tile, width = p.cols - first_col;
    const uint8_t* from = p.values + (batch * p.rows + first_row) * p.cols + first_col;
    uint8_t* to = p.values_transposed + (batch * p.cols + first_col) * p.rows + first_row;
    __syncthreads();  // the tile before is done with
    for (int i = int(threadIdx.x); i < int(kFp8Tile) * kWordsPerLine; i += kTransposeThreads) {
      const int row = i / kWordsPerLine, word = i % kWordsPerLine;
      const int64_t left = row < height ? width - 4 * word : 0;
      tile[row * kWordStride + word] = load_codes<kWords>(from + row * p.cols + 4 * word, left);
    }
    __syncthreads();
    // Four rows of a word become four words of a column each; a warp writes whole columns.
    for (int i = int(threadIdx.x); i < kWordsPerLine * kWordsPerLine; i += kTransposeThreads) {
      const int rows = i % kWordsPerLine, word = i / kWordsPerLine;
      uint32_t lines[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) lines[r] = tile[(4 * rows + r) * kWordStride + word];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        uint32_t column = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) column |= (lines[r] >> 8 * c & 0xffu) << 8 * r;
        const int col = 4 * word + c;
        store_word<kWords>(to + col * p.rows + 4 * rows, column, col < width ? height - 4 * rows : 0);
      }
    }
    if (threadIdx.x == 0) {
      const int64_t in_batch = batch * row_tiles * col_tiles;
      p.scales_transposed[in_batch + t * row_tiles + row_tile] = __ldg(p.scales + in_batch + row_tile * col_tiles + t);
    }
  }
}

constexpr int kDequantizeThreads = 256;

// Four values a thread: tiles are multiples of four, so that they share a scale.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_fp8_kernel(DequantizeFp8 p) {
  const int64_t row = blockIdx.x, col_tiles = fp8_tiles(p.cols);
  const int64_t scale_row = p.square ? row / p.rows * fp8_tiles(p.rows) + row % p.rows / kFp8Tile : row;
  const uint8_t* values = p.values + row * p.cols;
  Element* out = static_cast<Element*>(p.out) + row * p.cols;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int64_t step = int64_t(gridDim.y) * kDequantizeThreads * kCount;
  for (int64_t i = (int64_t(blockIdx.y) * kDequantizeThreads + threadIdx.x) * kCount; i < p.cols; i += step) {
    const float scale = __ldg(p.scales + scale_row * col_tiles + i / kFp8Tile);
    float results[kCount];
    if constexpr (kVectorized) {
      uint32_t words[kCount / 4];
#pragma unroll
      for (int w = 0; w < kCount / 4; ++w) words[w] = __ldg(reinterpret_cast<const uint32_t*>(values + i) + w);
#pragma unroll
      for (int j = 0; j < kCount; ++j) results[j] = from_e4m3(words[j / 4] >> j % 4 * 8 & 0xffu) * scale;
    } else {
      results[0] = from_e4m3(__ldg(values + i)) * scale;
    }
    store(out + i, results);
  }
}

}  // namespace k25::cuda
