// K2 router (spec 1.4): sigmoid, top-k of score + bias, weights renormalised and scaled.
#pragma once
#include "common/types.h"

namespace k25 {

struct RouteTokens {
  const void* logits;  // (T, E), dtype
  const float* bias;   // (E), selects and never weighs
  void* weights;       // (T, K), f64 when dtype is f64, else f32
  int32_t* experts;    // (T, K), by falling score + bias; ties go to the lower id
  DType dtype;
  int64_t num_tokens, num_experts;
  int top_k;
  double scale;
};

struct RouteTokensBackward {
  const void* grad_weights;  // (T, K), as weights above
  const void* logits;        // (T, E), dtype
  const int32_t* experts;    // (T, K)
  void* grad_logits;         // (T, E), dtype
  DType dtype;
  int64_t num_tokens, num_experts;
  int top_k;
  double scale;
};

namespace cpu {
// Throws std::invalid_argument for a NaN logit or bias, naming its position.
void route_tokens(const RouteTokens&, int num_threads);
void route_tokens_backward(const RouteTokensBackward&, int num_threads);
}  // namespace cpu

namespace cuda {
// A NaN score is never chosen before a number; it is not an error on the device.
void route_tokens(const RouteTokens&, Stream);
void route_tokens_backward(const RouteTokensBackward&, Stream);
}  // namespace cuda

}  // namespace k25
