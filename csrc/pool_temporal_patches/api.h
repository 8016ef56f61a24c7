// The mean over the frames of each clip, regrouped into neighbourhoods of merge_h x merge_w patches.
//
// The rows of a clip (t, h, w) lie frame by frame, each frame row-major. A neighbourhood holds merge_h runs of merge_w
// patches; a run is contiguous in every frame and in the result, so kernels work on runs of merge_w * dim elements.
#pragma once
#include "common/types.h"

namespace k25 {

struct Clip {
  int64_t first_patch;  // row of x
  int64_t first_out;    // neighbourhood of the result
  int64_t frames, height, width;
};

struct ClipTable {
  const void* grid;  // (N, 3) int32 or int64: t, h, w of each clip
  bool grid_is_int64;
  int64_t num_clips, num_patches, merge_h, merge_w;
  Clip* clips;  // (N), filled here
};

struct PoolTemporalPatches {
  const void* x;      // (P, D)
  const Clip* clips;  // (N), as clip_table fills it; on CUDA a copy on the device
  void* out;          // (num_out, merge_h * merge_w, D); summed in f32 (f64) in the order of the frames
  int64_t num_clips, num_patches, num_out, dim, merge_h, merge_w;
  DType dtype;
};

struct PoolTemporalPatchesBackward {
  const void* grad_out;  // (num_out, merge_h * merge_w, D)
  const Clip* clips;     // (N)
  void* grad_x;          // (P, D): every frame gets its share of the gradient, 1 / t
  int64_t num_clips, num_patches, num_out, dim, merge_h, merge_w;
  DType dtype;
};

namespace cpu {
// Returns num_out. Throws std::invalid_argument for a grid that does not describe num_patches rows, or that the
// neighbourhoods do not tile.
int64_t clip_table(const ClipTable&);
void pool_temporal_patches(const PoolTemporalPatches&, int num_threads);
void pool_temporal_patches_backward(const PoolTemporalPatchesBackward&, int num_threads);
}  // namespace cpu

namespace cuda {
void pool_temporal_patches(const PoolTemporalPatches&, Stream);
void pool_temporal_patches_backward(const PoolTemporalPatchesBackward&, Stream);
}  // namespace cuda

}  // namespace k25
