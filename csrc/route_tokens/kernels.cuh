// Device code of K2's router: a warp for each token, the token's keys in its registers.
#pragma once
#include "common/device.cuh"
#include "route_tokens/api.h"

namespace k25::cuda {

constexpr int kRouteWarps = 4;
constexpr int kRouteBlocks = 8;           // on one multiprocessor; without a number ptxas spills to fit more of them
constexpr float kWeightEpsilon = 1e-20f;  // spec 1.4

// Keys as unsigned integers of the same order. Below every number lies NaN, and below that what was already taken.
__device__ __forceinline__ uint32_t ordered(float key) {
  if (key != key) return 1;
  const uint32_t bits = __float_as_uint(key + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered(double key) {
  if (key != key) return 1;
  const uint64_t bits = uint64_t(__double_as_longlong(key + 0.0));
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}
constexpr int kTaken = 0;

__device__ __forceinline__ uint32_t warp_max(uint32_t key) { return __reduce_max_sync(kAllLanes, key); }
__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(key), distance);
    key = other > key ? other : key;
  }
  return key;
}

// A lane owns the experts (i * 32 + lane) * kPer + j, for i < kAccesses and j < kPer. Past the last expert: kTaken.
template <class Element, int kAccesses>
struct LaneKeys {
  using Scalar = ScalarOf<Element>;
  using Key = decltype(ordered(Scalar()));
  static constexpr int kPer = kPerAccess<Element, true>;

  Key keys[kAccesses][kPer];
  int lane;

  __device__ __forceinline__ uint32_t expert(int i, int j) const { return uint32_t((i * kWarpSize + lane) * kPer + j); }

  __device__ __forceinline__ void fill(const Element* logits, const float* bias, int64_t num_experts, bool vectorized) {
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
      Scalar values[kPer] = {};
      if (vectorized) {
        if (expert(i, 0) < num_experts) load(logits + expert(i, 0), values);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (expert(i, j) < num_experts) values[j] = load_one(logits + expert(i, j));
        }
      }
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const bool exists = expert(i, j) < num_experts;
        keys[i][j] = exists ? ordered(sigmoid(values[j]) + Scalar(__ldg(bias + expert(i, j)))) : Key(kTaken);
      }
    }
  }

  // The expert of the largest key in the warp, the lowest of equals, which is then taken.
  __device__ __forceinline__ uint32_t take_largest() {
    Key largest = kTaken;
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) largest = keys[i][j] > largest ? keys[i][j] : largest;
    }
    largest = warp_max(largest);
    uint32_t first = ~0u;
#pragma unroll
    for (int i = kAccesses - 1; i >= 0; --i) {
#pragma unroll
      for (int j = kPer - 1; j >= 0; --j) first = keys[i][j] == largest ? expert(i, j) : first;
    }
    first = __reduce_min_sync(kAllLanes, first);
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) keys[i][j] = expert(i, j) == first ? Key(kTaken) : keys[i][j];
    }
    return first;
  }
};

template <class Element, int kAccesses>
__global__ void __launch_bounds__(kRouteWarps* kWarpSize, kRouteBlocks)
    route_tokens_kernel(RouteTokens p, bool vectorized) {
  using Scalar = ScalarOf<Element>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = int64_t(blockIdx.x) * kRouteWarps + threadIdx.x / kWarpSize;
  if (t >= p.num_tokens) return;
  const Element* logits = static_cast<const Element*>(p.logits) + t * p.num_experts;
  LaneKeys<Element, kAccesses> owned;
  owned.lane = lane;
  owned.fill(logits, p.bias, p.num_experts, vectorized);
  uint32_t chosen = 0;  // lane k keeps the k-th choice
  for (int k = 0; k < p.top_k; ++k) {
    const uint32_t expert = owned.take_largest();
    if (lane == k) chosen = expert;
  }
  const Scalar score = lane < p.top_k ? sigmoid(load_one(logits + chosen)) : Scalar(0);
  const Scalar total = warp_sum(score) + Scalar(kWeightEpsilon);
  if (lane >= p.top_k) return;
  p.experts[t * p.top_k + lane] = int32_t(chosen);
  static_cast<Scalar*>(p.weights)[t * p.top_k + lane] = score / total * Scalar(p.scale);
}

// w_k = scale s_k / S, so dL/ds_k = scale (g_k - sum_j g_j s_j / S) / S, and ds/dlogit = s (1 - s). A warp for each
// token; the row of gradients takes form in shared memory, E scalars for each warp.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kRouteWarps* kWarpSize, kRouteBlocks)
    route_tokens_backward_kernel(RouteTokensBackward p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t t = int64_t(blockIdx.x) * kRouteWarps + warp;
  if (t >= p.num_tokens) return;
  Scalar* row = static_cast<Scalar*>(shared_memory()) + warp * p.num_experts;
  for (int64_t e = lane; e < p.num_experts; e += kWarpSize) row[e] = 0;
  __syncwarp();

  const bool chose = lane < p.top_k;
  const int64_t slot = t * p.top_k + lane;
  const int32_t expert = chose ? __ldg(p.experts + slot) : 0;
  require(expert >= 0 && expert < p.num_experts);
  const Element* logits = static_cast<const Element*>(p.logits) + t * p.num_experts;
  const Scalar score = chose ? sigmoid(load_one(logits + expert)) : Scalar(0);
  const Scalar upstream = chose ? __ldg(static_cast<const Scalar*>(p.grad_weights) + slot) : Scalar(0);
  const Scalar total = warp_sum(score) + Scalar(kWeightEpsilon);
  const Scalar dot = warp_sum(upstream * (score / total));
  if (chose) row[expert] = Scalar(p.scale) * (upstream - dot) / total * score * (1 - score);
  __syncwarp();

  Element* grad = static_cast<Element*>(p.grad_logits) + t * p.num_experts;
  for (int64_t e = lane * kCount; e < p.num_experts; e += kWarpSize * kCount) {
    Scalar values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = row[e + j];
    store(grad + e, values);
  }
}

}  // namespace k25::cuda
