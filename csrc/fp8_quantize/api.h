// E4M3 values with one f32 scale a tile: 1 x 128 (activations) or 128 x 128 (weights). Last tiles may be ragged.
#pragma once
#include "common/types.h"

namespace k25 {

constexpr int64_t kFp8Tile = 128;
constexpr float kFp8Max = 448.0f;

K25_EVERYWHERE constexpr int64_t fp8_tiles(int64_t size) { return (size + kFp8Tile - 1) / kFp8Tile; }

// scale = (largest finite |x| of the tile) / 448, value = x / scale rounded to nearest even; inf and NaN become NaN, a
// tile without finite numbers above 0 (or so small that the scale underflows) gets scale 0 and zeros.
struct QuantizeFp8 {
  const void* x;               // (B, M, K)
  uint8_t* values;             // (B, M, K)
  float* scales;               // (B, M, tiles of K), or (B, tiles of M, tiles of K) for square tiles
  uint8_t* values_transposed;  // (B, K, M) of tiles 1 x 128 along M, made in the same pass; or null
  float* scales_transposed;    // (B, K, tiles of M)
  int64_t batch, rows, cols;
  bool square, power_of_two;  // power_of_two rounds scales up to one
  DType dtype;                // f32 or bf16
};

struct DequantizeFp8 {
  const uint8_t* values;  // (B, M, K)
  const float* scales;    // as above
  void* out;              // (B, M, K)
  int64_t batch, rows, cols;
  bool square;
  DType dtype;  // f32 or bf16
};

// Values and scales of square tiles, transposed: a scale goes with its tile.
struct TransposeFp8 {
  const uint8_t* values;       // (B, M, K)
  const float* scales;         // (B, tiles of M, tiles of K)
  uint8_t* values_transposed;  // (B, K, M)
  float* scales_transposed;    // (B, tiles of K, tiles of M)
  int64_t batch, rows, cols;
};

namespace cpu {
void quantize_fp8(const QuantizeFp8&, int num_threads);
void dequantize_fp8(const DequantizeFp8&, int num_threads);
void transpose_fp8(const TransposeFp8&, int num_threads);
}  // namespace cpu

namespace cuda {
void quantize_fp8(const QuantizeFp8&, Stream);
void dequantize_fp8(const DequantizeFp8&, Stream);
void transpose_fp8(const TransposeFp8&, Stream);
}  // namespace cuda

}  // namespace k25
