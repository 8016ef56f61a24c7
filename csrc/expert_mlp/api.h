// The experts of a MoE layer, fused: gather -> grouped gate/up GEMM -> SwiGLU -> grouped down GEMM -> weighted combine.
// CPU only: on CUDA k25sys/ops/composed_experts.py makes the same from grouped GEMMs and the kernels beside this one.
#pragma once
#include "common/types.h"

namespace k25 {

struct ExpertMlp {
  const void* x;                                // (T, D)
  const void* gate_up;                          // (E, 2I, D): gate rows first, then up rows
  const void* down;                             // (E, D, I)
  const void* packed_gate_up;                   // kept pack of gate_up (PackKind::gate_up_forward), or null
  const void* packed_down;                      // kept pack of down (PackKind::down_forward), or null
  const void* weights;                          // (T, K) f32 (f64 when dtype is f64)
  const int32_t* offsets;                       // (E + 1)
  const int32_t* slot_of_row;                   // (M)
  const int32_t* row_of_slot;                   // (T, K)
  void* gate_up_rows;                           // (M, 2I): kept for the backward, or null
  void* act_rows;                               // (M, I): scratch
  void* out_rows;                               // (M, D): scratch
  void* out;                                    // (T, D)
  int64_t num_tokens, num_experts, dim, width;  // T, E, D, I; M = T * K
  int top_k;
  DType dtype;
  double* phase_seconds;  // 3: gate/up, down, combine; added to; or null
};

struct ExpertMlpBackward {
  const void* grad_out;        // (T, D)
  const void* x;               // (T, D)
  const void* gate_up;         // (E, 2I, D)
  const void* down;            // (E, D, I)
  const void* packed_gate_up;  // PackKind::gate_up_backward, or null
  const void* packed_down;     // PackKind::down_backward, or null
  const void* weights;         // (T, K)
  const int32_t* offsets;      // (E + 1)
  const int32_t* slot_of_row;  // (M)
  const int32_t* row_of_slot;  // (T, K)
  const void* gate_up_rows;    // (M, 2I), from the forward
  void* grad_gate_up_rows;     // (M, 2I): scratch
  void* weighted_act_rows;     // (M, I): scratch
  void* grad_x_rows;           // (M, D): scratch, may lie in grad_gate_up, which is written last; null when grad_x is
  void* grad_x;                // (T, D), or null
  void* grad_gate_up;          // (E, 2I, D) in weight_grad_dtype, or null
  void* grad_down;             // (E, D, I) in weight_grad_dtype, or null
  void* grad_weights;          // (T, K), or null
  bool accumulate;             // add to grad_gate_up and grad_down instead of overwriting them
  DType weight_grad_dtype;     // dtype, or f32
  int64_t num_tokens, num_experts, dim, width;
  int top_k;
  DType dtype;
  double* phase_seconds;  // 3: SwiGLU gradient, input and weight gradients, combine; added to; or null
};

enum class PackKind : int { gate_up_forward = 0, down_forward = 1, down_backward = 2, gate_up_backward = 3 };

// Weights rearranged once into the order in which the tiles of the current instruction set read them.
struct PackWeights {
  const void* weights;  // (E, rows, cols)
  void* packed;         // packed_bytes(...)
  int64_t num_experts, rows, cols;
  PackKind kind;
  DType dtype;
};

namespace cpu {
// Each throws std::out_of_range for a plan whose offsets or slots leave their tables.
void expert_mlp(const ExpertMlp&, int num_threads);
void expert_mlp_backward(const ExpertMlpBackward&, int num_threads);
int64_t packed_bytes(const PackWeights&);
void pack_weights(const PackWeights&, int num_threads);
}  // namespace cpu

}  // namespace k25
