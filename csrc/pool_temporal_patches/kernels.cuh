// Device code of temporal pooling: a warp for each run of merge_w patches, which is contiguous in every frame and in
// the result.
#pragma once
#include "common/device.cuh"
#include "pool_temporal_patches/api.h"

namespace k25::cuda {

constexpr int kPoolWarps = 8;   // warps of a block
constexpr int kPoolBlocks = 4;  // on one multiprocessor: 64 registers a thread

// Where a run lies: its first element in the clip's first frame, and the elements from one frame to the next.
struct RunPlace {
  int64_t first, frame, frames;
};

// The last clip that starts at neighbourhood `out` or before.
__device__ __forceinline__ Clip find_clip(const Clip* clips, int64_t num_clips, int64_t out) {
  int64_t low = 0, high = num_clips;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (__ldg(&clips[middle].first_out) <= out) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {__ldg(&clips[low].first_patch), __ldg(&clips[low].first_out), __ldg(&clips[low].frames),
          __ldg(&clips[low].height), __ldg(&clips[low].width)};
}

template <class Problem>
__device__ __forceinline__ RunPlace place_run(const Problem& p, int64_t run) {
  const int64_t out = run / p.merge_h;
  const Clip clip = find_clip(p.clips, p.num_clips, out);
  const int64_t across = clip.width / p.merge_w;
  const int64_t row = (out - clip.first_out) / across * p.merge_h + run % p.merge_h;
  const int64_t column = (out - clip.first_out) % across * p.merge_w;
  const int64_t patches = clip.height * clip.width;
  require(row < clip.height && clip.first_patch + clip.frames * patches <= p.num_patches);
  return {(clip.first_patch + row * clip.width + column) * p.dim, patches * p.dim, clip.frames};
}

template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kPoolWarps* kWarpSize, kPoolBlocks)
    pool_temporal_patches_kernel(PoolTemporalPatches p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int64_t run = int64_t(blockIdx.x) * kPoolWarps + threadIdx.x / kWarpSize;
  if (run >= p.num_out * p.merge_h) return;
  const RunPlace place = place_run(p, run);
  const Scalar frames = Scalar(place.frames);
  const int64_t length = p.merge_w * p.dim;
  const Element* from = static_cast<const Element*>(p.x) + place.first;
  Element* to = static_cast<Element*>(p.out) + run * length;
  for (int64_t i = threadIdx.x % kWarpSize * kCount; i < length; i += kWarpSize * kCount) {
    Scalar sums[kCount] = {};
#pragma unroll 4
    for (int64_t f = 0; f < place.frames; ++f) {
      Scalar values[kCount];
      load(from + f * place.frame + i, values);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[j] += values[j];
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sums[j] /= frames;
    store(to + i, sums);
  }
}

// Each frame gets the same share.
template <class Element, bool kVectorized>
__global__ void __launch_bounds__(kPoolWarps* kWarpSize, kPoolBlocks)
    pool_temporal_patches_backward_kernel(PoolTemporalPatchesBackward p) {
  using Scalar = ScalarOf<Element>;
  constexpr int kCount = kPerAccess<Element, kVectorized>;
  const int64_t run = int64_t(blockIdx.x) * kPoolWarps + threadIdx.x / kWarpSize;
  if (run >= p.num_out * p.merge_h) return;
  const RunPlace place = place_run(p, run);
  const Scalar frames = Scalar(place.frames);
  const int64_t length = p.merge_w * p.dim;
  const Element* from = static_cast<const Element*>(p.grad_out) + run * length;
  Element* to = static_cast<Element*>(p.grad_x) + place.first;
  for (int64_t i = threadIdx.x % kWarpSize * kCount; i < length; i += kWarpSize * kCount) {
    Scalar shares[kCount];
    load(from + i, shares);
#pragma unroll
    for (int j = 0; j < kCount; ++j) shares[j] /= frames;
    for (int64_t f = 0; f < place.frames; ++f) store(to + f * place.frame + i, shares);
  }
}

}  // namespace k25::cuda
