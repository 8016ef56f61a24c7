// The loss of one token: the only place where the objective is written down, for the CPU and for CUDA.
#pragma once
#include "policy_loss/api.h"

namespace k25 {

template <class S>
struct TokenLoss {
  S loss, slope;  // slope: by the log-probability
};

// With l = logprob - old and w = 1 / N: -w (exp(clip(l)) advantage - tau l^2). Outside [log_low, log_high], whatever
// the advantage's sign, the clipped ratio is a constant and only the penalty has a slope.
// `exponential` is the caller's exp: device code, and units of one instruction set, must not reach for std::exp.
template <class S, class Exponential>
K25_EVERYWHERE TokenLoss<S> token_loss(LossTokens p, int64_t t, S logprob, Exponential exponential) {
  const S weight = static_cast<const S*>(p.weights)[t];
  if (p.objective == Objective::cross_entropy) return {-weight * logprob, -weight};
  const S log_ratio = logprob - static_cast<const S*>(p.old_logprobs)[t];
  const S low = S(p.log_low), high = S(p.log_high);
  const bool inside = log_ratio >= low && log_ratio <= high;
  const S gain = exponential(inside            ? log_ratio
                             : log_ratio < low ? low
                                               : high) *  //
                 static_cast<const S*>(p.advantages)[t];
  const S penalty = inside || p.penalty_on_all ? S(p.tau) : S(0);
  return {-weight * (gain - penalty * log_ratio * log_ratio),
          -weight * ((inside ? gain : S(0)) - 2 * penalty * log_ratio)};
}

}  // namespace k25
