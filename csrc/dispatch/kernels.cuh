// Device code of dispatch, combine and the gradient of combine. Every index that a product of sizes can reach is 64
// bits.
#pragma once
#include "common/device.cuh"
#include "dispatch/api.h"

namespace k25::cuda {

constexpr int kRowWarps = 8;          // warps of a block that works on a row each
constexpr int kCombineThreads = 128;  // threads of a block that works on one token's columns

template <class Unit>
__device__ __forceinline__ void store_unit(Unit* p, Unit value) {
  *p = value;
}
__device__ __forceinline__ void store_unit(uint4* p, uint4 value) { store_words(p, value); }

// rows[m] = x[slot_of_row[m] / K], a warp for each row. Unit is a 16-byte word, or one element.
template <class Unit>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) dispatch_kernel(Dispatch p, int64_t units_per_row) {
  constexpr int kInFlight = 4;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t m = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (m >= p.num_rows) return;
  const int32_t slot = __ldg(p.slot_of_row + m);
  require(slot >= 0 && slot < p.num_tokens * p.top_k);
  const Unit* from = static_cast<const Unit*>(p.x) + slot / p.top_k * units_per_row;
  Unit* to = static_cast<Unit*>(p.rows) + m * units_per_row;
  int64_t i = lane;
  for (; i + (kInFlight - 1) * kWarpSize < units_per_row; i += kInFlight * kWarpSize) {
    Unit units[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) units[j] = __ldg(from + i + j * kWarpSize);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) store_unit(to + i + j * kWarpSize, units[j]);
  }
  for (; i < units_per_row; i += kWarpSize) store_unit(to + i, __ldg(from + i));
}

// out[t] = sum over k = 0, 1, ... of weights[t][k] * rows[row_of_slot[t][k]]: a block for a token and a part of its
// columns, an access's worth of columns for each thread.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(Combine p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int64_t first_slot = int64_t(blockIdx.x) * p.top_k;
  const int64_t step = int64_t(gridDim.y) * kCombineThreads * kCount;
  int64_t d = (int64_t(blockIdx.y) * kCombineThreads + threadIdx.x) * kCount;
  for (; d < p.dim; d += step) {
    Scalar sums[kCount] = {};
#pragma unroll 4
    for (int k = 0; k < p.top_k; ++k) {
      const int32_t row = __ldg(p.row_of_slot + first_slot + k);
      require(row >= 0 && row < p.num_rows);
      const Scalar weight = p.weights ? __ldg(static_cast<const Scalar*>(p.weights) + first_slot + k) : Scalar(1);
      Scalar values[kCount];
      load(static_cast<const Element*>(p.rows) + row * p.dim + d, values);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[j] = fma(values[j], weight, sums[j]);
    }
    store(static_cast<Element*>(p.out) + blockIdx.x * p.dim + d, sums);
  }
}

// grad_rows[m] = weight * grad_out[t] and grad_weights[slot] = <rows[m], grad_out[t]>, a warp for each row.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kRowWarps* kWarpSize) combine_backward_kernel(CombineBackward p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t m = int64_t(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
  if (m >= p.num_rows) return;
  const int32_t slot = __ldg(p.slot_of_row + m);
  require(slot >= 0 && slot < p.num_tokens * p.top_k);
  const Scalar weight = __ldg(static_cast<const Scalar*>(p.weights) + slot);
  const Element* grad_out = static_cast<const Element*>(p.grad_out) + slot / p.top_k * p.dim;
  const Element* row = static_cast<const Element*>(p.rows) + m * p.dim;
  Element* grad_row = static_cast<Element*>(p.grad_rows) + m * p.dim;
  Scalar dot = 0;
#pragma unroll 2
  for (int64_t d = lane * kCount; d < p.dim; d += kWarpSize * kCount) {
    Scalar grads[kCount], values[kCount];
    load(grad_out + d, grads);
    load(row + d, values);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      dot = fma(grads[j], values[j], dot);
      grads[j] *= weight;
    }
    store(grad_row + d, grads);
  }
  dot = warp_sum(dot);
  if (lane == 0) static_cast<Scalar*>(p.grad_weights)[slot] = dot;
}

}  // namespace k25::cuda
