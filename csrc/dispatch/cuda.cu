#include <algorithm>

#include "dispatch/kernels.cuh"

namespace k25::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

bool whole_words(int64_t dim, DType dtype) { return dim * size_of(dtype) % 16 == 0; }

template <class Unit>
void launch_dispatch(const Dispatch& p, Stream stream) {
  const int64_t units_per_row = p.dim * size_of(p.dtype) / int64_t(sizeof(Unit));
  const auto kernel = &dispatch_kernel<Unit>;
  K25_LAUNCH(kernel, dim3(unsigned(ceil_div(p.num_rows, kRowWarps))), kRowWarps * kWarpSize, 0, stream, p,
             units_per_row);
}

template <class Element, bool kVectorized>
void launch_combine(const Combine& p, Stream stream) {
  const int64_t columns = int64_t(kCombineThreads) * kPerAccess<Element, kVectorized>;
  const dim3 grid(unsigned(p.num_tokens), unsigned(std::min(ceil_div(p.dim, columns), kMaxGridY)));
  const auto kernel = &combine_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, grid, kCombineThreads, 0, stream, p);
}

template <class Element, bool kVectorized>
void launch_combine_backward(const CombineBackward& p, Stream stream) {
  const auto kernel = &combine_backward_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, dim3(unsigned(ceil_div(p.num_rows, kRowWarps))), kRowWarps * kWarpSize, 0, stream, p);
}

}  // namespace

void dispatch(const Dispatch& p, Stream stream) {
  if (p.num_rows == 0 || p.dim == 0) return;
  if (whole_words(p.dim, p.dtype) && aligned16(p.x, p.rows)) return launch_dispatch<uint4>(p, stream);
  if (p.dtype == DType::bf16) return launch_dispatch<unsigned short>(p, stream);
  if (p.dtype == DType::f32) return launch_dispatch<unsigned int>(p, stream);
  launch_dispatch<unsigned long long>(p, stream);
}

void combine(const Combine& p, Stream stream) {
  if (p.num_tokens == 0 || p.dim == 0) return;
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (whole_words(p.dim, p.dtype) && aligned16(p.rows, p.out)) return launch_combine<Element, true>(p, stream);
    launch_combine<Element, false>(p, stream);
  });
}

void combine_backward(const CombineBackward& p, Stream stream) {
  if (p.num_rows == 0) return;
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (whole_words(p.dim, p.dtype) && aligned16(p.grad_out, p.rows, p.grad_rows)) {
      return launch_combine_backward<Element, true>(p, stream);
    }
    launch_combine_backward<Element, false>(p, stream);
  });
}

}  // namespace k25::cuda
