// Tensor maps and launches of the kernel in kernels.cuh, and the choice of its tile.
#pragma once
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "gemm/kernels.cuh"

namespace k25::cuda {

// What all products have in common on the host.
struct GemmCall {
  const void* a;
  const void* b;
  void* out;
  const int32_t* offsets;
  const float* a_scales;
  const float* b_scales;
  int64_t rows, columns, depth, num_experts;
  DType out_dtype;
};

inline GemmCall call_of(const GemmBf16& p) {
  return {p.a, p.b, p.out, p.offsets, nullptr, nullptr, p.rows, p.columns, p.depth, p.num_experts, p.out_dtype};
}
inline GemmCall call_of(const GemmFp8& p) {
  return {p.a, p.b, p.out, p.offsets, p.a_scales, p.b_scales, p.rows, p.columns, p.depth, p.num_experts, p.out_dtype};
}

template <class Config>
CUtensorMap map_of_operand(const void* address, int64_t depth, int64_t rows, int box_rows) {
  const auto type = Config::kScaled ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_of({address,
                        type,
                        2,
                        {uint64_t(depth), uint64_t(rows), 1},
                        {uint64_t(depth) * Config::Operands::kBytes, 0},
                        {uint32_t(Config::kTileK), uint32_t(box_rows), 1}});
}

// B as (E, K, N): boxes of 64 columns.
template <class Config>
CUtensorMap map_of_transposed(const GemmCall& c) {
  const uint64_t columns = uint64_t(c.columns), depth = uint64_t(c.depth), bytes = Config::Operands::kBytes;
  return tensor_map_of({c.b,
                        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                        3,
                        {columns, depth, uint64_t(c.num_experts)},
                        {columns * bytes, columns * depth * bytes},
                        {uint32_t(kSwizzleBytes / bytes), uint32_t(Config::kTileK), 1}});
}

inline CUtensorMap map_of_result(const GemmCall& c) {
  const bool f32 = c.out_dtype == DType::f32;
  const auto type = f32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const uint64_t bytes = uint64_t(size_of(c.out_dtype));
  return tensor_map_of({c.out,
                        type,
                        2,
                        {uint64_t(c.columns), uint64_t(c.rows), 1},
                        {uint64_t(c.columns) * bytes, 0},
                        {uint32_t(kSwizzleBytes / bytes), uint32_t(kRowsPerConsumer), 1}});
}

// At most this many tiles, counting that each expert's last row tile is not full.
inline int64_t tile_bound(const GemmCall& c, int tile_n) {
  const int64_t experts = c.offsets ? c.num_experts : 1;
  const int64_t row_tiles = std::min(c.rows / kTileM + experts, c.rows);
  return row_tiles * ceil_div(c.columns, tile_n);
}

template <class Config>
void launch_gemm(const GemmCall& c, Stream stream) {
  const bool by_bulk_store = c.columns * size_of(c.out_dtype) % 16 == 0;
  const CUtensorMap map_a = map_of_operand<Config>(c.a, c.depth, c.rows, kTileM);
  CUtensorMap map_b;
  if constexpr (Config::kTransposedB) {
    map_b = map_of_transposed<Config>(c);
  } else {
    map_b = map_of_operand<Config>(c.b, c.depth, c.num_experts * c.columns, Config::kTileN);
  }
  const CUtensorMap map_out = by_bulk_store ? map_of_result(c) : map_a;
  const GemmParams params{c.offsets,
                          c.a_scales,
                          c.b_scales,
                          c.out,
                          int(c.rows),
                          int(c.columns),
                          int(c.num_experts),
                          int(ceil_div(c.depth, Config::kTileK)),
                          c.out_dtype == DType::f32,
                          by_bulk_store};
  const auto kernel = &gemm_kernel<Config>;
  allow_shared_memory(kernel, Config::kSharedBytes);
  const int64_t blocks = std::min<int64_t>(num_multiprocessors(), tile_bound(c, Config::kTileN));
  K25_LAUNCH(kernel, dim3(unsigned(blocks)), kGemmThreads, Config::kSharedBytes, stream, map_a, map_b, map_out, params);
}

// Of the widths, the one whose waves take least time. A tile's time is taken as its width, plus a share that does not
// depend on it: a tile loads its rows of A and starts and ends whatever its width. Ties go to the widest, which loads
// least.
inline int choose_tile_n(const GemmCall& c, std::initializer_list<int> widths) {
  constexpr int64_t kFixedShare = 32;
  const int64_t experts = c.offsets ? c.num_experts : 1, blocks = num_multiprocessors();
  const int64_t row_tiles = experts * ceil_div(ceil_div(c.rows, experts), kTileM);
  int64_t least = std::numeric_limits<int64_t>::max();
  int best = 0;
  for (const int width : widths) {
    const int64_t time = ceil_div(row_tiles * ceil_div(c.columns, width), blocks) * (width + kFixedShare);
    if (time > least) continue;
    least = time;
    best = width;
  }
  return best;
}

inline void check_size(const char* op, const char* name, int64_t value, int64_t least, int64_t multiple) {
  if (value >= least && value <= std::numeric_limits<int32_t>::max() && value % multiple == 0) return;
  throw std::invalid_argument(std::string(op) + ": " + name + " is " + std::to_string(value) + "; it must be " +
                              std::to_string(least) + " to 2^31 - 1 and a multiple of " + std::to_string(multiple));
}

// False if there is nothing to do.
inline bool check_gemm(const char* op, const GemmCall& c, int64_t row_multiple) {
  check_size(op, "rows", c.rows, 0, 1);
  check_size(op, "columns", c.columns, 0, 1);
  check_size(op, "depth", c.depth, 1, row_multiple);
  check_size(op, "num_experts", c.num_experts, 1, 1);
  check_size(op, "num_experts * columns", c.num_experts * c.columns, 0, 1);
  check_size(op, "the number of tiles", tile_bound(c, 64), 0, 1);
  if (!c.offsets && c.num_experts != 1) throw std::invalid_argument(std::string(op) + ": several experts need offsets");
  if (c.out_dtype == DType::f64) throw std::invalid_argument(std::string(op) + ": the result is bf16 or f32");
  if (!aligned16(c.a, c.b, c.out)) {
    throw std::invalid_argument(std::string(op) + ": operands and result must be at multiples of 16 bytes");
  }
  return c.rows > 0 && c.columns > 0;
}

}  // namespace k25::cuda
