// The output head with a loss on top, without logits for more than a chunk of tokens. What depends on the objective
// lies between the two: log-sum-exp over the vocabulary's shards and the slope of each token's loss
// (policy_loss/api.h). Logits are kept transposed, (V, T): the head's rows are then read in place and sums over V run
// along whole vectors.
#pragma once
#include "common/types.h"

namespace k25 {

constexpr int64_t kMostTokensOfHeadGrad = 512;  // in a chunk: a sum over more would go through memory more than once

struct LinearLogits {
  const void* hidden;      // (T, D)
  const void* head;        // (V, D)
  const int64_t* targets;  // (T)
  void* logits_VT;         // (V, T) S: f32, or f64 where dtype is f64
  void* stats;             // (T, 4) S: max, sum of exp(x - max), of exp(x - max) (x - max), target's logit
  int64_t num_tokens, vocab, vocab_start, dim;
  DType dtype;  // of hidden and head
};

struct LinearGrads {
  const void* hidden;       // (T, D)
  const void* head;         // (V, D)
  const int64_t* targets;   // (T)
  const void* log_sums;     // (T) S: log of the sum of exp(logits) over the whole vocabulary
  const void* slopes;       // (T) S: derivative of the loss by the log-probability
  void* logits_VT;          // (V, T) S; overwritten by their gradient of dtype, each row where its logits begin
  void* grad_hidden;        // (T, D)
  void* grad_head;          // (V, D) of grad_head_dtype
  uint16_t* grad_head_low;  // (V, D): the lower halves of f32 sums whose upper halves are in a bf16 grad_head; or null
  bool first, last;         // chunk of a grad_head: the first overwrites unless it accumulates, the last rounds
  int64_t num_tokens, vocab, vocab_start, dim;
  DType dtype, grad_head_dtype;
};

namespace cpu {
void linear_logits(const LinearLogits&, int num_threads);
void linear_grads(const LinearGrads&, int num_threads);
}  // namespace cpu

}  // namespace k25
