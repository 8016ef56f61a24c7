#include <type_traits>

#include "common/cpu/isa_functions.h"
#include "common/threads.h"
#include "policy_loss/rows.h"
#include "policy_loss/token.h"

namespace k25::cpu::K25_ISA {
namespace {

template <class Element>
struct Losses {
  using S = typename Compute<Element>::Scalar;
  using Row = LossRow<Element>;

  static const Element* row_of(const void* logits, int64_t t, int64_t vocab) {
    return static_cast<const Element*>(logits) + t * vocab;
  }

  static void stats(const LogitStats& p, int num_threads) {
    parallel_for(p.num_tokens, num_threads, [&](int64_t t) {
      auto* out = static_cast<S*>(p.stats) + 4 * t;
      RowStats<S> row{};
      if (static_cast<const S*>(p.weights)[t] != 0) {
        row = Row::template stats<false>(row_of(p.logits, t, p.vocab), p.vocab, p.targets[t] - p.vocab_start, nullptr);
      }
      out[0] = row.max;
      out[1] = row.sum;
      out[2] = row.weighted;
      out[3] = row.target;
    });
  }

  static void grad(const LogitGrad& p, int num_threads) {
    parallel_for(p.num_tokens, num_threads, [&](int64_t t) {
      Row::grad(row_of(p.logits, t, p.vocab), static_cast<Element*>(p.grad_logits) + t * p.vocab, p.vocab,
                p.targets[t] - p.vocab_start, static_cast<const S*>(p.log_sums)[t], static_cast<const S*>(p.slopes)[t]);
    });
  }

  // The row stays in the second-level cache from its maximum to its gradient, and so do its exponentials: one a logit.
  static void rows(const LossRows& p, int num_threads) {
    constexpr bool in_out = std::is_same_v<S, Element>;  // room for the exponentials is where the gradient will be
    parallel_for(p.num_tokens, num_threads, [&](int64_t t) {
      const Element* row = row_of(p.logits, t, p.vocab);
      const int64_t target = p.targets[t] - p.vocab_start;
      auto* grad = p.grad_logits ? static_cast<Element*>(p.grad_logits) + t * p.vocab : nullptr;
      TokenLoss<S> token{};
      RowStats<S> stats{};
      S log_sum = 0, logprob = 0, entropy = 0, *kept = nullptr;
      if (static_cast<const S*>(p.tokens.weights)[t] != 0) {
        if (grad) kept = in_out ? reinterpret_cast<S*>(grad) : scratch(p.vocab);
        stats = grad ? Row::template stats<true>(row, p.vocab, target, kept)
                     : Row::template stats<false>(row, p.vocab, target, nullptr);
        log_sum = stats.max + log_of(stats.sum);
        logprob = stats.target - log_sum;
        entropy = log_of(stats.sum) - stats.weighted / stats.sum;
        token = token_loss(p.tokens, t, logprob, exp_of<S>);
      }
      static_cast<S*>(p.logprobs)[t] = logprob;
      static_cast<S*>(p.entropies)[t] = entropy;
      static_cast<S*>(p.losses)[t] = token.loss;
      if (grad) Row::grad_of_kept(kept, grad, p.vocab, target, stats, log_sum, token.slope);
      stream_fence();
    });
  }
  static S* scratch(int64_t vocab) {
    return static_cast<S*>(thread_scratch(Scratch::partial, vocab * int64_t(sizeof(S))));
  }
};

template <class S>
void losses_of_tokens(const TokenLosses& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    TokenLoss<S> token{};
    if (static_cast<const S*>(p.tokens.weights)[t] != 0) {
      token = token_loss(p.tokens, t, static_cast<const S*>(p.logprobs)[t], exp_of<S>);
    }
    static_cast<S*>(p.losses)[t] = token.loss;
    static_cast<S*>(p.slopes)[t] = token.slope;
  }
}

}  // namespace

void token_losses(const TokenLosses& p, int) {
  if (p.dtype == DType::f64) return losses_of_tokens<double>(p);
  losses_of_tokens<float>(p);
}

void logit_stats(const LogitStats& p, int num_threads) {
  if (p.dtype == DType::bf16) return Losses<Bf16>::stats(p, num_threads);
  if (p.dtype == DType::f32) return Losses<float>::stats(p, num_threads);
  Losses<double>::stats(p, num_threads);
}

void logit_grad(const LogitGrad& p, int num_threads) {
  if (p.dtype == DType::bf16) return Losses<Bf16>::grad(p, num_threads);
  if (p.dtype == DType::f32) return Losses<float>::grad(p, num_threads);
  Losses<double>::grad(p, num_threads);
}

void loss_rows(const LossRows& p, int num_threads) {
  if (p.dtype == DType::bf16) return Losses<Bf16>::rows(p, num_threads);
  if (p.dtype == DType::f32) return Losses<float>::rows(p, num_threads);
  Losses<double>::rows(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
