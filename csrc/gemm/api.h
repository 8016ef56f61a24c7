// Matrix products on the tensor cores of sm_90a, for all rows with one matrix or for contiguous rows of each expert.
#pragma once
#include "common/types.h"

namespace k25 {

// out[m] = a[m] b[e(m)]^T, summed in f32. With `offsets`, on the device, expert e has the rows offsets[e] ..
// offsets[e + 1]; rows outside all experts are not written. Without, there is one expert with all rows.
// Addresses are multiples of 16.
struct GemmBf16 {
  const void* a;           // (M, K)
  const void* b;           // (E, N, K), or (E, K, N) if b_is_transposed
  const int32_t* offsets;  // (E + 1), rising, or null
  void* out;               // (M, N) bf16 or f32
  int64_t rows, columns, depth, num_experts;
  bool b_is_transposed;  // columns are then a multiple of 8
  DType out_dtype;
};

// The same with E4M3 operands, each 128 elements of K scaled: products of 128 are summed by the tensor cores and
// added up in f32.
struct GemmFp8 {
  const void* a;           // (M, K) e4m3
  const void* b;           // (E, N, K) e4m3
  const float* a_scales;   // (M, ceil(K / 128))
  const float* b_scales;   // (E, ceil(N / 128), ceil(K / 128))
  const int32_t* offsets;  // (E + 1), rising, or null
  void* out;               // (M, N) bf16 or f32
  int64_t rows, columns, depth, num_experts;
  DType out_dtype;
};

// Weight gradients: out[e] = the sum over the rows m of expert e of a[m]^T b[m], in f32; zeros for an expert without
// rows. Both widths are multiples of 8. With `accumulate` that is added to what `out` holds, and rounded once.
struct GemmBf16WeightGrads {
  const void* a;           // (M, N), the gradient of what a product with B (E, N, K) gave
  const void* b;           // (M, K), what was multiplied
  const int32_t* offsets;  // (E + 1), rising, or null
  void* out;               // (E, N, K) bf16 or f32
  int64_t rows, a_width, b_width, num_experts;
  bool accumulate;
  DType out_dtype;
};

// The same of E4M3 operands, transposed, so that the reduction runs along their rows. Each expert begins at a multiple
// of 128, so that no scale belongs to two; rows are a multiple of 16.
struct GemmFp8WeightGrads {
  const void* a;           // (N, M) e4m3
  const void* b;           // (K, M) e4m3
  const float* a_scales;   // (N, ceil(M / 128))
  const float* b_scales;   // (K, ceil(M / 128))
  const int32_t* offsets;  // (E + 1), rising, multiples of 128 or M; or null
  void* out;               // (E, N, K) bf16 or f32
  int64_t rows, a_width, b_width, num_experts;
  bool accumulate;
  DType out_dtype;
};

namespace cuda {
// Throw std::invalid_argument for sizes that they do not take: a row of each operand is a multiple of 16 bytes.
void gemm_bf16(const GemmBf16&, Stream);
void gemm_fp8(const GemmFp8&, Stream);
void gemm_bf16_weight_grads(const GemmBf16WeightGrads&, Stream);
void gemm_fp8_weight_grads(const GemmFp8WeightGrads&, Stream);
}  // namespace cuda

}  // namespace k25
