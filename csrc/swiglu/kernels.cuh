// Device code of SwiGLU: a block for one row and a part of its columns, an access's worth of columns for each thread.
#pragma once
#include "common/device.cuh"
#include "swiglu/api.h"

namespace k25::cuda {

constexpr int kSwigluThreads = 128;
constexpr int kSwigluBlocks = 8;  // on one multiprocessor; without a number ptxas spills to fit more of them

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kSwigluThreads, kSwigluBlocks) swiglu_kernel(Swiglu p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const Element* row = static_cast<const Element*>(p.gate_up) + 2 * blockIdx.x * p.width;
  Element* act = static_cast<Element*>(p.act) + blockIdx.x * p.width;
  const int64_t step = int64_t(gridDim.y) * kSwigluThreads * kCount;
  int64_t i = (int64_t(blockIdx.y) * kSwigluThreads + threadIdx.x) * kCount;
  for (; i < p.width; i += step) {
    Scalar gates[kCount], ups[kCount];
    load(row + i, gates);
    load(row + p.width + i, ups);
#pragma unroll
    for (int j = 0; j < kCount; ++j) gates[j] = gates[j] * sigmoid(gates[j]) * ups[j];
    store(act + i, gates);
  }
}

// With s = sigmoid(gate): d(gate) = g up s (1 + gate (1 - s)), d(up) = g gate s.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kSwigluThreads, kSwigluBlocks) swiglu_backward_kernel(SwigluBackward p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const Element* row = static_cast<const Element*>(p.gate_up) + 2 * blockIdx.x * p.width;
  const Element* grad_act = static_cast<const Element*>(p.grad_act) + blockIdx.x * p.width;
  Element* grad_row = static_cast<Element*>(p.grad_gate_up) + 2 * blockIdx.x * p.width;
  const int64_t step = int64_t(gridDim.y) * kSwigluThreads * kCount;
  int64_t i = (int64_t(blockIdx.y) * kSwigluThreads + threadIdx.x) * kCount;
  for (; i < p.width; i += step) {
    Scalar gates[kCount], ups[kCount], grads[kCount];
    load(row + i, gates);
    load(row + p.width + i, ups);
    load(grad_act + i, grads);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Scalar score = sigmoid(gates[j]);
      const Scalar gate = gates[j];
      gates[j] = grads[j] * ups[j] * score * fma(gate, 1 - score, Scalar(1));
      ups[j] = grads[j] * gate * score;
    }
    store(grad_row + i, gates);
    store(grad_row + p.width + i, ups);
  }
}

constexpr int kSwigluRowWarps = 8;  // of a block; each works on a row

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kSwigluRowWarps* kWarpSize) weighted_swiglu_grads_kernel(WeightedSwigluBackward p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int lane = int(threadIdx.x) % kWarpSize;
  const int64_t m = int64_t(blockIdx.x) * kSwigluRowWarps + threadIdx.x / kWarpSize;
  if (m >= p.num_rows) return;
  const int32_t slot = __ldg(p.slot_of_row + m);
  require(slot >= 0 && slot < p.num_rows);
  const Scalar weight = __ldg(static_cast<const Scalar*>(p.weights) + slot);
  const Element* row = static_cast<const Element*>(p.gate_up) + 2 * m * p.width;
  const Element* grad_act = static_cast<const Element*>(p.grad_act) + m * p.width;
  Element* grad_row = static_cast<Element*>(p.grad_gate_up) + 2 * m * p.width;
  Element* act = static_cast<Element*>(p.weighted_act) + m * p.width;
  Scalar dot = 0;
  for (int64_t i = lane * kCount; i < p.width; i += kWarpSize * kCount) {
    Scalar gates[kCount], ups[kCount], grads[kCount];
    load(row + i, gates);
    load(row + p.width + i, ups);
    load(grad_act + i, grads);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Scalar gate = gates[j], score = sigmoid(gate), value = gate * score * ups[j];
      dot = fma(grads[j], value, dot);
      const Scalar weighted = grads[j] * weight;
      gates[j] = weighted * ups[j] * score * fma(gate, 1 - score, Scalar(1));
      ups[j] = weighted * gate * score;
      grads[j] = value * weight;
    }
    store(grad_row + i, gates);
    store(grad_row + p.width + i, ups);
    store(act + i, grads);
  }
  dot = warp_sum(dot);
  if (lane == 0 && p.grad_weights) static_cast<Scalar*>(p.grad_weights)[slot] = dot;
}

}  // namespace k25::cuda
