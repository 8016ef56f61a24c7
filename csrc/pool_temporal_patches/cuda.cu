#include "pool_temporal_patches/kernels.cuh"

namespace k25::cuda {
namespace {

template <class Problem>
dim3 grid_of(const Problem& p) {
  return dim3(unsigned(ceil_div(p.num_out * p.merge_h, kPoolWarps)));
}

template <class Element, bool kVectorized>
void launch(const PoolTemporalPatches& p, Stream stream) {
  const auto kernel = &pool_temporal_patches_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, grid_of(p), kPoolWarps * kWarpSize, 0, stream, p);
}

template <class Element, bool kVectorized>
void launch(const PoolTemporalPatchesBackward& p, Stream stream) {
  const auto kernel = &pool_temporal_patches_backward_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, grid_of(p), kPoolWarps * kWarpSize, 0, stream, p);
}

// A run starts at any patch: with whole words in a patch, every run is aligned where the tensors are.
template <class Problem>
void launch(const Problem& p, bool aligned, Stream stream) {
  if (p.num_out == 0 || p.dim == 0) return;
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (aligned && p.dim * size_of(p.dtype) % 16 == 0) return launch<Element, true>(p, stream);
    launch<Element, false>(p, stream);
  });
}

}  // namespace

void pool_temporal_patches(const PoolTemporalPatches& p, Stream stream) { launch(p, aligned16(p.x, p.out), stream); }

void pool_temporal_patches_backward(const PoolTemporalPatchesBackward& p, Stream stream) {
  launch(p, aligned16(p.grad_out, p.grad_x), stream);
}

}  // namespace k25::cuda
