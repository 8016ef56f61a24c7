#include "route_tokens/kernels.cuh"

namespace k25::cuda {
namespace {

dim3 grid_of(int64_t num_tokens) { return dim3(unsigned(ceil_div(num_tokens, kRouteWarps))); }

bool whole_words(int64_t num_experts, DType dtype) { return num_experts * size_of(dtype) % 16 == 0; }

template <class Element, int kAccesses>
void launch(const RouteTokens& p, Stream stream) {
  const bool vectorized = whole_words(p.num_experts, p.dtype) && aligned16(p.logits);
  const auto kernel = &route_tokens_kernel<Element, kAccesses>;
  K25_LAUNCH(kernel, grid_of(p.num_tokens), kRouteWarps * kWarpSize, 0, stream, p, vectorized);
}

template <class Element, bool kVectorized>
void launch_backward(const RouteTokensBackward& p, Stream stream) {
  const size_t shared_bytes = kRouteWarps * size_t(p.num_experts) * sizeof(ScalarOf<Element>);
  const auto kernel = &route_tokens_backward_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, grid_of(p.num_tokens), kRouteWarps * kWarpSize, shared_bytes, stream, p);
}

}  // namespace

// k25sys.ops accepts up to 512 experts. kAccesses is what they need; 384 experts of f32, K2's router, are three.
void route_tokens(const RouteTokens& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const int64_t accesses = ceil_div(p.num_experts * size_of(p.dtype), 16 * kWarpSize);
  if (p.dtype == DType::f64) return accesses <= 2 ? launch<double, 2>(p, stream) : launch<double, 8>(p, stream);
  if (p.dtype == DType::bf16) return accesses <= 1 ? launch<Bf16, 1>(p, stream) : launch<Bf16, 2>(p, stream);
  if (accesses <= 1) return launch<float, 1>(p, stream);
  if (accesses <= 3) return launch<float, 3>(p, stream);
  launch<float, 4>(p, stream);
}

void route_tokens_backward(const RouteTokensBackward& p, Stream stream) {
  if (p.num_tokens == 0) return;
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (whole_words(p.num_experts, p.dtype) && aligned16(p.grad_logits)) {
      return launch_backward<Element, true>(p, stream);
    }
    launch_backward<Element, false>(p, stream);
  });
}

}  // namespace k25::cuda
