// Rows to experts and back: gather by plan, and the weighted, fixed-order sum that undoes it.
#pragma once
#include "common/types.h"

namespace k25 {

struct Dispatch {
  const void* x;               // (T, D)
  const int32_t* slot_of_row;  // (M)
  void* rows;                  // (M, D)
  int64_t num_tokens, num_rows, dim;
  int top_k;
  DType dtype;
};

struct Combine {
  const void* rows;            // (M, D)
  const void* weights;         // (T, K) f32 (f64 when dtype is f64), or null: all ones
  const int32_t* row_of_slot;  // (T, K)
  void* out;                   // (T, D); summed in f32 (f64) in the order k = 0, 1, ...
  int64_t num_tokens, num_rows, dim;
  int top_k;
  DType dtype;
};

struct CombineBackward {
  const void* grad_out;        // (T, D)
  const void* rows;            // (M, D)
  const void* weights;         // (T, K) f32 (f64)
  const int32_t* slot_of_row;  // (M)
  void* grad_rows;             // (M, D)
  void* grad_weights;          // (T, K) f32 (f64)
  int64_t num_tokens, num_rows, dim;
  int top_k;
  DType dtype;
};

namespace cpu {
// Each throws std::out_of_range for a plan entry outside its table.
void dispatch(const Dispatch&, int num_threads);
void combine(const Combine&, int num_threads);
void combine_backward(const CombineBackward&, int num_threads);
}  // namespace cpu

namespace cuda {
void dispatch(const Dispatch&, Stream);
void combine(const Combine&, Stream);
void combine_backward(const CombineBackward&, Stream);
}  // namespace cuda

}  // namespace k25
