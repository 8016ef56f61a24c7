// Device code of the policy loss: a block for one row of logits, which it reads once for the log-sum-exp and once more,
// from the second-level cache, for the gradient.
#pragma once
#include "common/device.cuh"
#include "policy_loss/token.h"

namespace k25::cuda {

constexpr int kTokenThreads = 128;
constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;

__device__ __forceinline__ float natural_exp(float x) { return expf(x); }
__device__ __forceinline__ double natural_exp(double x) { return exp(x); }
__device__ __forceinline__ float natural_log(float x) { return logf(x); }
__device__ __forceinline__ double natural_log(double x) { return log(x); }
template <class S>
struct NaturalExp {
  __device__ __forceinline__ S operator()(S x) const { return natural_exp(x); }
};

// Not through the read-only path: the gradient may overwrite the logits.
template <int kCount, class Element>
__device__ __forceinline__ void load_changing(const Element* p, ScalarOf<Element> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    if constexpr (sizeof(Element) == 2) {
      values[0] = __uint_as_float(uint32_t(*reinterpret_cast<const unsigned short*>(p)) << 16);
    } else {
      values[0] = *p;
    }
  } else {
    unpack(*reinterpret_cast<const uint4*>(p), values);
  }
}

template <class S>
struct Sums {
  S max, sum, weighted;  // sum of exp(x - max), of exp(x - max) (x - max)

  // The sums of both sets; a set without a number above -inf adds nothing.
  __device__ __forceinline__ void join(S other_max, S other_sum, S other_weighted) {
    const S top = other_max > max ? other_max : max;
    const S mine = max > S(-1e30) ? natural_exp(max - top) : S(0);
    const S theirs = other_max > S(-1e30) ? natural_exp(other_max - top) : S(0);
    weighted = mine == 0 ? S(0) : (weighted + sum * (max - top)) * mine;
    weighted += theirs == 0 ? S(0) : (other_weighted + other_sum * (other_max - top)) * theirs;
    sum = sum * mine + other_sum * theirs;
    max = top;
  }
};

template <class S>
__device__ __forceinline__ Sums<S> warp_join(Sums<S> sums) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const S max = __shfl_xor_sync(kAllLanes, sums.max, distance);
    const S sum = __shfl_xor_sync(kAllLanes, sums.sum, distance);
    const S weighted = __shfl_xor_sync(kAllLanes, sums.weighted, distance);
    sums.join(max, sum, weighted);
  }
  return sums;
}

// Of one row, the same in every thread. `shared` holds kRowWarps sets; the caller synchronises before it is used again.
template <class Element, bool kVectorized>
__device__ __forceinline__ Sums<ScalarOf<Element>> row_sums(const Element* row, int64_t vocab,
                                                            Sums<ScalarOf<Element>>* shared) {
  using S = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  Sums<S> mine{S(-1.0 / 0.0), 0, 0};
  for (int64_t i = int64_t(threadIdx.x) * kCount; i < vocab; i += kRowThreads * kCount) {
    S x[kCount];
    load_changing(row + i, x);
    S top = mine.max;
#pragma unroll
    for (int j = 0; j < kCount; ++j) top = x[j] > top ? x[j] : top;
    const S base = top > S(-1e30) ? top : S(0);
    const S scale = mine.max > S(-1e30) ? natural_exp(mine.max - base) : S(0);
    const S shift = mine.max > S(-1e30) ? mine.max - base : S(0);
    mine = {top, mine.sum * scale, (mine.weighted + mine.sum * shift) * scale};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const S e = natural_exp(x[j] - base);
      mine.sum += e;
      mine.weighted += e == 0 ? S(0) : e * (x[j] - base);  // a forbidden token is -inf
    }
  }
  mine = warp_join(mine);
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  return warp_join(lane < kRowWarps ? shared[lane] : Sums<S>{S(-1.0 / 0.0), 0, 0});
}

template <class Element>
__device__ __forceinline__ ScalarOf<Element> logit_at(const Element* row, int64_t target, int64_t vocab) {
  ScalarOf<Element> value[1] = {ScalarOf<Element>(-1.0 / 0.0)};
  if (target >= 0 && target < vocab) load_changing(row + target, value);
  return value[0];
}

// slope (1[v = target] - exp(x - log_sum)); zeros, without a look at the logits, where the slope is 0.
template <class Element, bool kVectorized>
__device__ __forceinline__ void write_grad(const Element* row, Element* out, int64_t vocab, int64_t target,
                                           ScalarOf<Element> log_sum, ScalarOf<Element> slope) {
  using S = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  for (int64_t i = int64_t(threadIdx.x) * kCount; i < vocab; i += kRowThreads * kCount) {
    S x[kCount] = {};
    if (slope != 0) {
      load_changing(row + i, x);
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = slope * (S(i + j == target) - natural_exp(x[j] - log_sum));
    }
    store(out + i, x);
  }
}

template <class S>
__global__ void __launch_bounds__(kTokenThreads) token_losses_kernel(TokenLosses p) {
  const int64_t t = int64_t(blockIdx.x) * kTokenThreads + threadIdx.x;
  if (t >= p.num_tokens) return;
  TokenLoss<S> token{0, 0};
  if (static_cast<const S*>(p.tokens.weights)[t] != 0) {
    token = token_loss(p.tokens, t, static_cast<const S*>(p.logprobs)[t], NaturalExp<S>());
  }
  static_cast<S*>(p.losses)[t] = token.loss;
  static_cast<S*>(p.slopes)[t] = token.slope;
}

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kRowThreads, 2) logit_stats_kernel(LogitStats p) {
  using S = ScalarOf<Element>;
  const int64_t t = blockIdx.x;
  const Element* row = static_cast<const Element*>(p.logits) + t * p.vocab;
  S* out = static_cast<S*>(p.stats) + 4 * t;
  if (static_cast<const S*>(p.weights)[t] == 0) {
    if (threadIdx.x < 4) out[threadIdx.x] = 0;
    return;
  }
  const Sums<S> sums = row_sums<Element, kVectorized>(row, p.vocab, static_cast<Sums<S>*>(shared_memory()));
  if (threadIdx.x != 0) return;
  out[0] = sums.max;
  out[1] = sums.sum;
  out[2] = sums.weighted;
  out[3] = logit_at(row, p.targets[t] - p.vocab_start, p.vocab);
}

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kRowThreads, 2) logit_grad_kernel(LogitGrad p) {
  using S = ScalarOf<Element>;
  const int64_t t = blockIdx.x;
  write_grad<Element, kVectorized>(
      static_cast<const Element*>(p.logits) + t * p.vocab, static_cast<Element*>(p.grad_logits) + t * p.vocab, p.vocab,
      p.targets[t] - p.vocab_start, static_cast<const S*>(p.log_sums)[t], static_cast<const S*>(p.slopes)[t]);
}

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kRowThreads, 2) loss_rows_kernel(LossRows p) {
  using S = ScalarOf<Element>;
  const int64_t t = blockIdx.x, target = p.targets[t] - p.vocab_start;
  const Element* row = static_cast<const Element*>(p.logits) + t * p.vocab;
  TokenLoss<S> token{0, 0};
  S log_sum = 0, logprob = 0, entropy = 0;
  if (static_cast<const S*>(p.tokens.weights)[t] != 0) {
    const S at_target = logit_at(row, target, p.vocab);  // by every thread, before one overwrites it
    const Sums<S> sums = row_sums<Element, kVectorized>(row, p.vocab, static_cast<Sums<S>*>(shared_memory()));
    log_sum = sums.max + natural_log(sums.sum);
    logprob = at_target - log_sum;
    entropy = natural_log(sums.sum) - sums.weighted / sums.sum;
    token = token_loss(p.tokens, t, logprob, NaturalExp<S>());
  }
  if (threadIdx.x == 0) {
    static_cast<S*>(p.logprobs)[t] = logprob;
    static_cast<S*>(p.entropies)[t] = entropy;
    static_cast<S*>(p.losses)[t] = token.loss;
  }
  if (!p.grad_logits) return;
  write_grad<Element, kVectorized>(row, static_cast<Element*>(p.grad_logits) + t * p.vocab, p.vocab, target, log_sum,
                                   token.slope);
}

}  // namespace k25::cuda
