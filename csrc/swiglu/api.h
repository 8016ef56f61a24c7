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

namespace cpu {
void swiglu(const Swiglu&, int num_threads);
void swiglu_backward(const SwigluBackward&, int num_threads);
}  // namespace cpu

namespace cuda {
void swiglu(const Swiglu&, Stream);
void swiglu_backward(const SwigluBackward&, Stream);
}  // namespace cuda

}  // namespace k25
