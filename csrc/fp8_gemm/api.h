// GEMMs of E4M3 operands with scales a tile (fp8_quantize/api.h). Products of one tile of the reduction are summed in
// f32 and added to the result times both scales: sum over tiles t of a_scale[m, t] b_scale[n, t] sum over k in t of a
// b.
#pragma once
#include "fp8_quantize/api.h"

namespace k25 {

enum class Fp8Grouping : int {
  rows = 0,             // out (M, N): rows of group g times its b (N, K), whose scales are of square tiles
  rows_transposed = 1,  // the same with b (K, N) a group
  reduction = 2,  // out (G, M, N): columns of group g of a (M, K) and of b (N, K), whose scales are of 1 x 128 tiles
};

struct Fp8Gemm {
  const uint8_t* a;        // (M, K)
  const float* a_scales;   // (M, tiles of K)
  const uint8_t* b;        // (G, N, K), (G, K, N) or (N, K)
  const float* b_scales;   // (G, tiles of N, tiles of K), (G, tiles of K, tiles of N) or (N, tiles of K)
  const int32_t* offsets;  // (G + 1): rows of a, or columns (multiples of 128 but for the last), of each group
  void* out;               // f32 or bf16
  int64_t m, n, k, num_groups;
  Fp8Grouping grouping;
  DType out_dtype;
};

namespace cpu {
// Throws std::out_of_range for offsets that do not rise from 0 to the end.
void fp8_gemm(const Fp8Gemm&, int num_threads);
}  // namespace cpu

namespace cuda {
// Throws std::invalid_argument for rows_transposed, whose b transpose_fp8 turns into that of rows, and for what
// gemm/api.h does not take. Offsets, which may be null for one group of rows, trap.
void fp8_gemm(const Fp8Gemm&, Stream);
}  // namespace cuda

}  // namespace k25
