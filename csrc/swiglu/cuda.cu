#include <algorithm>

#include "swiglu/kernels.cuh"

namespace k25::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

template <class Element, bool kVectorized>
dim3 grid_of(int64_t num_rows, int64_t width) {
  const int64_t columns = int64_t(kSwigluThreads) * kPerAccess<Element, kVectorized>;
  return dim3(unsigned(num_rows), unsigned(std::min(ceil_div(width, columns), kMaxGridY)));
}

template <class Element, bool kVectorized>
void launch(const Swiglu& p, Stream stream) {
  const auto kernel = &swiglu_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, (grid_of<Element, kVectorized>(p.num_rows, p.width)), kSwigluThreads, 0, stream, p);
}

template <class Element, bool kVectorized>
void launch(const SwigluBackward& p, Stream stream) {
  const auto kernel = &swiglu_backward_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, (grid_of<Element, kVectorized>(p.num_rows, p.width)), kSwigluThreads, 0, stream, p);
}

template <class Problem>
void launch(const Problem& p, bool aligned, Stream stream) {
  if (p.num_rows == 0 || p.width == 0) return;
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (aligned && p.width * size_of(p.dtype) % 16 == 0) return launch<Element, true>(p, stream);
    launch<Element, false>(p, stream);
  });
}

template <class Element, bool kVectorized>
void launch_weighted(const WeightedSwigluBackward& p, Stream stream) {
  const auto kernel = &weighted_swiglu_grads_kernel<Element, kVectorized>;
  const dim3 grid(unsigned(ceil_div(p.num_rows, kSwigluRowWarps)));
  K25_LAUNCH(kernel, grid, kSwigluRowWarps * kWarpSize, 0, stream, p);
}

}  // namespace

void weighted_swiglu_backward(const WeightedSwigluBackward& p, Stream stream) {
  if (p.num_rows == 0) return;
  const bool aligned = aligned16(p.grad_act, p.gate_up, p.grad_gate_up, p.weighted_act);
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (aligned && p.width * size_of(p.dtype) % 16 == 0) return launch_weighted<Element, true>(p, stream);
    launch_weighted<Element, false>(p, stream);
  });
}

void swiglu(const Swiglu& p, Stream stream) { launch(p, aligned16(p.gate_up, p.act), stream); }

void swiglu_backward(const SwigluBackward& p, Stream stream) {
  launch(p, aligned16(p.grad_act, p.gate_up, p.grad_gate_up), stream);
}

}  // namespace k25::cuda
