#include "policy_loss/kernels.cuh"

namespace k25::cuda {
namespace {

// Calls run(Element{}, vectorized) for rows of `vocab` elements of `dtype`.
template <class Run>
void with_rows(DType dtype, int64_t vocab, bool aligned, Run run) {
  with_element(dtype, [&](auto element) {
    if (aligned && vocab * size_of(dtype) % 16 == 0) return run(element, std::true_type());
    run(element, std::false_type());
  });
}

template <class Element>
constexpr size_t kSumsBytes = kRowWarps * sizeof(Sums<ScalarOf<Element>>);

}  // namespace

void token_losses(const TokenLosses& p, Stream stream) {
  if (p.num_tokens == 0) return;
  const auto kernel = p.dtype == DType::f64 ? &token_losses_kernel<double> : &token_losses_kernel<float>;
  K25_LAUNCH(kernel, unsigned(ceil_div(p.num_tokens, kTokenThreads)), kTokenThreads, 0, stream, p);
}

void logit_stats(const LogitStats& p, Stream stream) {
  if (p.num_tokens == 0) return;
  with_rows(p.dtype, p.vocab, aligned16(p.logits), [&](auto element, auto vectorized) {
    const auto kernel = &logit_stats_kernel<decltype(element), vectorized.value>;
    K25_LAUNCH(kernel, unsigned(p.num_tokens), kRowThreads, kSumsBytes<decltype(element)>, stream, p);
  });
}

void logit_grad(const LogitGrad& p, Stream stream) {
  if (p.num_tokens == 0) return;
  with_rows(p.dtype, p.vocab, aligned16(p.logits, p.grad_logits), [&](auto element, auto vectorized) {
    const auto kernel = &logit_grad_kernel<decltype(element), vectorized.value>;
    K25_LAUNCH(kernel, unsigned(p.num_tokens), kRowThreads, 0, stream, p);
  });
}

void loss_rows(const LossRows& p, Stream stream) {
  if (p.num_tokens == 0) return;
  with_rows(p.dtype, p.vocab, aligned16(p.logits, p.grad_logits), [&](auto element, auto vectorized) {
    const auto kernel = &loss_rows_kernel<decltype(element), vectorized.value>;
    K25_LAUNCH(kernel, unsigned(p.num_tokens), kRowThreads, kSumsBytes<decltype(element)>, stream, p);
  });
}

}  // namespace k25::cuda
