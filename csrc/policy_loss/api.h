// K2.5's policy loss (arXiv 2602.02276, section 4.4.2, eq. 1) and cross-entropy, from log-probabilities or from rows of
// logits. S below is f32, or f64 where the logits are f64. A token whose weight is 0 has no loss: nothing of it is
// read.
#pragma once
#include "common/types.h"

namespace k25 {

enum class Objective : int { clipped_log_ratio = 0, cross_entropy = 1 };

// What is known of each token before its log-probability.
struct LossTokens {
  const void* old_logprobs;  // (T) S; clipped_log_ratio only
  const void* advantages;    // (T) S; clipped_log_ratio only
  const void* weights;       // (T) S: 1 / N
  Objective objective;
  double log_low, log_high, tau;
  bool penalty_on_all;
};

struct TokenLosses {
  LossTokens tokens;
  const void* logprobs;  // (T) S
  void* losses;          // (T) S
  void* slopes;          // (T) S: derivative of the loss by the log-probability
  int64_t num_tokens;
  DType dtype;  // of S
};

// The columns [vocab_start, vocab_start + vocab) of a vocabulary. A target outside of them has no logit here: -inf.
struct LogitStats {
  const void* logits;      // (T, V)
  const int64_t* targets;  // (T)
  const void* weights;     // (T) S
  void* stats;             // (T, 4) S: max, sum of exp(x - max), sum of exp(x - max) (x - max), the target's logit
  int64_t num_tokens, vocab, vocab_start;
  DType dtype;  // of logits
};

struct LogitGrad {
  const void* logits;      // (T, V)
  const int64_t* targets;  // (T)
  const void* log_sums;    // (T) S: log of the sum of exp(logits) over the whole vocabulary
  const void* slopes;      // (T) S; a row whose slope is 0 becomes zeros
  void* grad_logits;       // (T, V); may be `logits`
  int64_t num_tokens, vocab, vocab_start;
  DType dtype;  // of logits and grad_logits
};

// LogitStats, TokenLosses and LogitGrad in one pass over each row, for a vocabulary that is all here.
struct LossRows {
  LossTokens tokens;
  const void* logits;      // (T, V)
  const int64_t* targets;  // (T)
  void* logprobs;          // (T) S
  void* entropies;         // (T) S
  void* losses;            // (T) S
  void* grad_logits;       // (T, V); may be `logits`; null where no gradient is wanted
  int64_t num_tokens, vocab, vocab_start;
  DType dtype;  // of logits and grad_logits
};

namespace cpu {
// Each throws std::invalid_argument for a loss token whose numbers are not finite, std::out_of_range for its target.
void token_losses(const TokenLosses&, int num_threads);
void logit_stats(const LogitStats&, int num_threads);
void logit_grad(const LogitGrad&, int num_threads);
void loss_rows(const LossRows&, int num_threads);
}  // namespace cpu

namespace cuda {
void token_losses(const TokenLosses&, Stream);
void logit_stats(const LogitStats&, Stream);
void logit_grad(const LogitGrad&, Stream);
void loss_rows(const LossRows&, Stream);
}  // namespace cuda

}  // namespace k25
