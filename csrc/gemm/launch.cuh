// Tensor maps and launches of the kernel in kernels.cuh.
#pragma once
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "gemm/kernels.cuh"

namespace k25::cuda {

// What all products have in common on the host: the result is (rows, columns), and depth is what is summed over. Of
// weight gradients, rows are those of all experts and depth is the number of rows of both operands.
struct GemmCall {
  const void* a;
  const void* b;
  void* out;
  const int32_t* offsets;
  const float* a_scales;
  const float* b_scales;
  int64_t rows, columns, depth, num_experts;
  DType out_dtype;
  bool accumulate;
};

inline GemmCall call_of(const GemmBf16& p) {
  return {p.a, p.b, p.out, p.offsets, nullptr, nullptr, p.rows, p.columns, p.depth, p.num_experts, p.out_dtype, false};
}
inline GemmCall call_of(const GemmFp8& p) {
  return {p.a,    p.b,       p.out,   p.offsets,     p.a_scales,  p.b_scales,
          p.rows, p.columns, p.depth, p.num_experts, p.out_dtype, false};
}
inline GemmCall call_of(const GemmBf16WeightGrads& p) {
  const int64_t rows = p.num_experts * p.a_width;
  return {p.a,  p.b,       p.out,  p.offsets,     nullptr,     nullptr,
          rows, p.b_width, p.rows, p.num_experts, p.out_dtype, p.accumulate};
}
inline GemmCall call_of(const GemmFp8WeightGrads& p) {
  const int64_t rows = p.num_experts * p.a_width;
  return {p.a,  p.b,       p.out,  p.offsets,     p.a_scales,  p.b_scales,
          rows, p.b_width, p.rows, p.num_experts, p.out_dtype, p.accumulate};
}

// An operand with `rows` rows of `width` elements, and the box of it that a copy loads.
template <class Config>
CUtensorMap map_of_operand(const void* address, int64_t width, int64_t rows, int box_width, int box_rows) {
  const auto type = Config::kScaled ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map_of({address,
                        type,
                        2,
                        {uint64_t(width), uint64_t(rows), 1},
                        {uint64_t(width) * Config::Operands::kBytes, 0},
                        {uint32_t(box_width), uint32_t(box_rows), 1}});
}

template <class Config>
CUtensorMap map_of_a(const GemmCall& c) {
  const int64_t height = Config::kWeightGrads ? c.rows / c.num_experts : c.rows;
  if constexpr (Config::kMnMajorA) {
    return map_of_operand<Config>(c.a, height, c.depth, Config::kBoxWidth, Config::kTileK);
  } else {
    return map_of_operand<Config>(c.a, c.depth, height, Config::kTileK, kTileM);
  }
}

template <class Config>
CUtensorMap map_of_b(const GemmCall& c) {
  if constexpr (!Config::kMnMajorB) {
    const int64_t rows = Config::kWeightGrads ? c.columns : c.num_experts * c.columns;
    return map_of_operand<Config>(c.b, c.depth, rows, Config::kTileK, Config::kTileN);
  } else if constexpr (Config::kWeightGrads) {
    return map_of_operand<Config>(c.b, c.columns, c.depth, Config::kBoxWidth, Config::kTileK);
  } else {
    // Three dimensions: K that ends within a tile must not go on in the next expert's matrix.
    const uint64_t columns = uint64_t(c.columns), depth = uint64_t(c.depth), bytes = Config::Operands::kBytes;
    return tensor_map_of({c.b,
                          CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                          3,
                          {columns, depth, uint64_t(c.num_experts)},
                          {columns * bytes, columns * depth * bytes},
                          {uint32_t(Config::kBoxWidth), uint32_t(Config::kTileK), 1}});
  }
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

// At most this many row tiles: how many rows each expert has is known on the device alone, and each may end within a
// tile. Of weight gradients, all experts have the same rows.
inline int64_t row_tile_bound(const GemmCall& c, bool weight_grads) {
  if (weight_grads) return c.num_experts * ceil_div(c.rows / c.num_experts, kTileM);
  return std::min(c.rows / kTileM + c.num_experts, c.rows);
}

template <class Config>
void launch_gemm(const GemmCall& c, Stream stream) {
  const bool f32 = c.out_dtype == DType::f32;
  const bool by_bulk_store = c.columns * size_of(c.out_dtype) % 16 == 0 && (f32 || !c.accumulate);
  const CUtensorMap map_a = map_of_a<Config>(c), map_b = map_of_b<Config>(c);
  const CUtensorMap map_out = by_bulk_store ? map_of_result(c) : map_a;
  const GemmParams params{c.offsets,    c.a_scales,         c.b_scales, c.out,         int(c.rows), int(c.columns),
                          int(c.depth), int(c.num_experts), f32,        by_bulk_store, c.accumulate};
  const auto kernel = &gemm_kernel<Config>;
  allow_shared_memory(kernel, Config::kSharedBytes);
  const int64_t tiles = row_tile_bound(c, Config::kWeightGrads) * ceil_div(c.columns, Config::kTileN);
  const int64_t blocks = std::min<int64_t>(num_multiprocessors(), tiles);
  K25_LAUNCH(kernel, dim3(unsigned(blocks)), kGemmThreads, Config::kSharedBytes, stream, map_a, map_b, map_out, params);
}

template <int kCount>
int choose_tile_n(const GemmCall& c, const int (&widths)[kCount]) {
  return choose_tile_n({c.rows, c.columns, c.num_experts}, widths, num_multiprocessors());
}

inline void check_size(const char* op, const char* name, int64_t value, int64_t least, int64_t multiple) {
  if (value >= least && value <= std::numeric_limits<int32_t>::max() && value % multiple == 0) return;
  throw std::invalid_argument(std::string(op) + ": " + name + " is " + std::to_string(value) + "; it must be " +
                              std::to_string(least) + " to 2^31 - 1 and a multiple of " + std::to_string(multiple));
}

// False if there is nothing to do.
inline bool check_gemm(const char* op, const GemmCall& c) {
  check_size(op, "rows", c.rows, 0, 1);
  check_size(op, "columns", c.columns, 0, 1);
  check_size(op, "num_experts", c.num_experts, 1, 1);
  check_size(op, "num_experts * columns", c.num_experts * c.columns, 0, 1);
  check_size(op, "the number of tiles", (c.rows / kTileM + c.num_experts) * ceil_div(c.columns, 64), 0, 1);
  if (!c.offsets && c.num_experts != 1) throw std::invalid_argument(std::string(op) + ": several experts need offsets");
  if (c.out_dtype == DType::f64) throw std::invalid_argument(std::string(op) + ": the result is bf16 or f32");
  if (!aligned16(c.a, c.b, c.out)) {
    throw std::invalid_argument(std::string(op) + ": operands and result must be at multiples of 16 bytes");
  }
  return c.rows > 0 && c.columns > 0;
}

}  // namespace k25::cuda
