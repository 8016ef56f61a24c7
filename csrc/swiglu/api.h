// act = silu(gate) * up over rows that hold gate first, then up.
#pragma once
#include "common/types.h"

namespace k25 {

struct Swiglu {
  const void* gate_up;  // (M, 2I)
  void* act;            // (M, I)
  int64_t num_rows, width;
  DType dtype;
};

struct SwigluBackward {
  const void* grad_act;  // (M, I)
  const void* gate_up;   // (M, 2I)
  void* grad_gate_up;    // (M, 2I)
  int64_t num_rows, width;
  DType dtype;
};

// The gradients behind the experts' down projection, whose rows carry no routing weight yet. With a row's weight w and
// g its grad_act, both gradients are those of w g; weighted_act is w act, and the weight's own gradient <g, act>.
struct WeightedSwigluBackward {
  const void* grad_act;        // (M, I)
  const void* gate_up;         // (M, 2I)
  const void* weights;         // (M) by slot, f32 (f64 when dtype is f64)
  const int32_t* slot_of_row;  // (M)
  void* grad_gate_up;          // (M, 2I)
  void* weighted_act;          // (M, I)
  void* grad_weights;          // (M) by slot, or null
  int64_t num_rows, width;
  DType dtype;
};

namespace cpu {
void swiglu(const Swiglu&, int num_threads);
void swiglu_backward(const SwigluBackward&, int num_threads);
// Throws std::out_of_range for a slot that no row can have.
void weighted_swiglu_backward(const WeightedSwigluBackward&, int num_threads);
}  // namespace cpu

namespace cuda {
void swiglu(const Swiglu&, Stream);
void swiglu_backward(const SwigluBackward&, Stream);
void weighted_swiglu_backward(const WeightedSwigluBackward&, Stream);
}  // namespace cuda

}  // namespace k25
