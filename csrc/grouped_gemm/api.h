// Products of contiguous rows with the matrix of their expert, and the gradients of those matrices.
#pragma once
#include "common/types.h"

namespace k25 {

// out[m] = a[m] b[e]^T for the rows offsets[e] <= m < offsets[e + 1] of each expert e.
struct GroupedGemm {
  const void* a;           // (M, K)
  const void* b;           // (E, N, K), or (E, K, N) if b_is_transposed
  const int32_t* offsets;  // (E + 1), rising from 0 to M
  void* out;               // (M, N)
  int64_t rows, columns, depth, num_experts;
  bool b_is_transposed;
  DType dtype;  // of a, b and out; f32 accumulation for bf16
};

// out[e] = the sum over the rows m of expert e of a[m]^T b[m], added to what out holds if `accumulate`.
struct GroupedGemmWeightGrads {
  const void* a;           // (M, N)
  const void* b;           // (M, K)
  const int32_t* offsets;  // (E + 1), rising from 0 to M
  void* out;               // (E, N, K)
  int64_t rows, a_width, b_width, num_experts;
  bool accumulate;
  DType dtype, out_dtype;  // of a and b; of out: the same, or f32
};

namespace cpu {
// Throw std::out_of_range for offsets that do not rise from 0 to M.
void grouped_gemm(const GroupedGemm&, int num_threads);
void grouped_gemm_weight_grads(const GroupedGemmWeightGrads&, int num_threads);
}  // namespace cpu

namespace cuda {
// bf16 alone, M and K at least 1; throw std::invalid_argument for what gemm/api.h does not take. Offsets trap.
void grouped_gemm(const GroupedGemm&, Stream);
void grouped_gemm_weight_grads(const GroupedGemmWeightGrads&, Stream);
}  // namespace cuda

}  // namespace k25
