#include "common/cpu/e4m3.h"
#include "common/cpu/isa_functions.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Lanes that are inf or NaN count as 0.
K25_INLINE F32V finite_size(F32V value) {
  const U32V size = (U32V)value & 0x7fffffffu;
  return (F32V)((U32V)(size < 0x7f800000u) ? size : U32V{});
}

float largest_lane(F32V value) {
  float most = value[0];
  for (int i = 1; i < kLanes; ++i) most = value[i] > most ? value[i] : most;
  return most;
}

float scale_of(float largest, bool power_of_two) {
  const float scale = largest / kFp8Max;
  if (!power_of_two || scale == 0) return scale;
  uint32_t bits;
  std::memcpy(&bits, &scale, 4);
  if (bits < 0x800000u) return 1.17549435e-38f;  // no subnormal scales
  bits = (bits + 0x7fffffu) & 0xff800000u;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

template <class Element>
struct Quantizer {
  const QuantizeFp8& p;

  const Element* row(int64_t batch, int64_t m) const {
    return static_cast<const Element*>(p.x) + (batch * p.rows + m) * p.cols;
  }

  float largest_of(const Element* from, int64_t count) const {
    F32V most{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const F32V size = finite_size(load_partial(from + i, count - i));
      most = size > most ? size : most;
    }
    return largest_lane(most);
  }

  void encode(const Element* from, uint8_t* to, int64_t count, float scale) const {
    // A scale of 0 divides by inf: zeros, and NaN for what is not finite.
    const F32V divisor = splat(scale > 0 ? scale : __builtin_inff());
    for (int64_t i = 0; i < count; i += kLanes) {
      const F32V value = load_partial(from + i, count - i);
      const F32V kept = (U32V)(((U32V)value & 0x7fffffffu) < 0x7f800000u) ? value / divisor : splat(__builtin_nanf(""));
      store_codes(to + i, encode_e4m3(kept), count - i);
    }
  }

  // Rows [first, first + count), at most 128 of them, of one matrix.
  void rows(int64_t batch, int64_t first, int64_t count) const {
    const int64_t tiles = fp8_tiles(p.cols);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = tile * kFp8Tile, width = smaller(kFp8Tile, p.cols - column);
      float square = 0;
      for (int64_t m = first; p.square && m < first + count; ++m) {
        const float largest = largest_of(row(batch, m) + column, width);
        square = largest > square ? largest : square;
      }
      if (p.square) {
        p.scales[(batch * fp8_tiles(p.rows) + first / kFp8Tile) * tiles + tile] = scale_of(square, p.power_of_two);
      }
      for (int64_t m = first; m < first + count; ++m) {
        const Element* from = row(batch, m) + column;
        const float scale = scale_of(p.square ? square : largest_of(from, width), p.power_of_two);
        if (!p.square) p.scales[(batch * p.rows + m) * tiles + tile] = scale;
        encode(from, p.values + (batch * p.rows + m) * p.cols + column, width, scale);
      }
      if (p.values_transposed) transposed_tile(batch, first, count, column, width);
    }
  }

  void transposed_tile(int64_t batch, int64_t first, int64_t count, int64_t column, int64_t width) const {
    Element line[kFp8Tile];
    for (int64_t c = column; c < column + width; ++c) {
      for (int64_t m = 0; m < count; ++m) line[m] = row(batch, first + m)[c];
      const float scale = scale_of(largest_of(line, count), p.power_of_two);
      p.scales_transposed[(batch * p.cols + c) * fp8_tiles(p.rows) + first / kFp8Tile] = scale;
      encode(line, p.values_transposed + (batch * p.cols + c) * p.rows + first, count, scale);
    }
  }

  void run(int num_threads) const {
    const int64_t tiles = fp8_tiles(p.rows);
    parallel_for(p.batch * tiles, num_threads, [&](int64_t i) {
      const int64_t first = i % tiles * kFp8Tile;
      rows(i / tiles, first, smaller(kFp8Tile, p.rows - first));
    });
  }
};

template <class Element>
void dequantize(const DequantizeFp8& p, int num_threads) {
  const int64_t tiles = fp8_tiles(p.cols);
  parallel_ranges(p.batch * p.rows, 16, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t scale_row = p.square ? r / p.rows * fp8_tiles(p.rows) + r % p.rows / kFp8Tile : r;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float scale = p.scales[scale_row * tiles + tile];
        const int64_t stop = smaller((tile + 1) * kFp8Tile, p.cols);
        for (int64_t c = tile * kFp8Tile; c < stop; c += kLanes) {
          const F32V value = decode_e4m3(load_codes(p.values + r * p.cols + c, stop - c)) * scale;
          store_partial(static_cast<Element*>(p.out) + r * p.cols + c, value, stop - c);
        }
      }
    }
  });
}

}  // namespace

void quantize_fp8(const QuantizeFp8& p, int num_threads) {
  if (p.dtype == DType::bf16) return Quantizer<Bf16>{p}.run(num_threads);
  Quantizer<float>{p}.run(num_threads);
}

void dequantize_fp8(const DequantizeFp8& p, int num_threads) {
  if (p.dtype == DType::bf16) return dequantize<Bf16>(p, num_threads);
  dequantize<float>(p, num_threads);
}

void transpose_fp8(const TransposeFp8& p, int num_threads) {
  const int64_t row_tiles = fp8_tiles(p.rows), col_tiles = fp8_tiles(p.cols);
  parallel_for(p.batch * row_tiles, num_threads, [&](int64_t i) {
    const int64_t batch = i / row_tiles, tile = i % row_tiles, last = smaller(p.rows, (tile + 1) * kFp8Tile);
    for (int64_t t = 0; t < col_tiles; ++t) {
      for (int64_t c = t * kFp8Tile; c < smaller(p.cols, (t + 1) * kFp8Tile); ++c) {
        uint8_t* to = p.values_transposed + (batch * p.cols + c) * p.rows;
        for (int64_t m = tile * kFp8Tile; m < last; ++m) to[m] = p.values[(batch * p.rows + m) * p.cols + c];
      }
      p.scales_transposed[(batch * col_tiles + t) * row_tiles + tile] = p.scales[i * col_tiles + t];
    }
  });
}

}  // namespace k25::cpu::K25_ISA
