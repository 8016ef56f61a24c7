#include "common/cpu/isa_functions.h"
#include "common/cpu/simd.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

constexpr int kMaxExperts = 512;
constexpr double kWeightEpsilon = 1e-20;  // spec 1.4

template <class Element>
struct Router {
  using Scalar = typename Compute<Element>::Scalar;
  using Vector = typename Compute<Element>::Vector;
  static constexpr int lanes = sizeof(Vector) / sizeof(Scalar);

  static void scores_of(const Element* logits, int64_t num_experts, Scalar* scores) {
    for (int64_t e = 0; e < num_experts; e += lanes) {
      store_partial(scores + e, sigmoid(load_partial(logits + e, num_experts - e)), num_experts - e);
    }
  }

  // The top_k largest of `keys`, in falling order; equal keys keep the lower id first.
  static void select(const Scalar* keys, int64_t num_experts, int top_k, int32_t* chosen) {
    int count = 0;
    for (int32_t e = 0; e < num_experts; ++e) {
      if (count == top_k && !(keys[e] > keys[chosen[count - 1]])) continue;
      int at = count < top_k ? count++ : count - 1;
      for (; at > 0 && keys[e] > keys[chosen[at - 1]]; --at) chosen[at] = chosen[at - 1];
      chosen[at] = e;
    }
  }

  static void forward(const RouteTokens& p, int num_threads) {
    parallel_ranges(p.num_tokens, 16, num_threads, [&](int64_t begin, int64_t end) {
      Scalar scores[kMaxExperts], keys[kMaxExperts];
      for (int64_t t = begin; t < end; ++t) {
        scores_of(static_cast<const Element*>(p.logits) + t * p.num_experts, p.num_experts, scores);
        for (int64_t e = 0; e < p.num_experts; ++e) keys[e] = scores[e] + Scalar(p.bias[e]);
        int32_t* chosen = p.experts + t * p.top_k;
        select(keys, p.num_experts, p.top_k, chosen);
        Scalar total = Scalar(kWeightEpsilon);
        for (int k = 0; k < p.top_k; ++k) total += scores[chosen[k]];
        for (int k = 0; k < p.top_k; ++k) {
          static_cast<Scalar*>(p.weights)[t * p.top_k + k] = scores[chosen[k]] / total * Scalar(p.scale);
        }
      }
    });
  }

  // w_k = scale s_k / S, so dL/ds_k = (scale g_k - sum_j g_j w_j) / S, and ds/dlogit = s (1 - s).
  static void backward(const RouteTokensBackward& p, int num_threads) {
    parallel_ranges(p.num_tokens, 16, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto* logits = static_cast<const Element*>(p.logits) + t * p.num_experts;
        const auto* upstream = static_cast<const Scalar*>(p.grad_weights) + t * p.top_k;
        const int32_t* chosen = p.experts + t * p.top_k;
        auto* grad = static_cast<Element*>(p.grad_logits) + t * p.num_experts;
        std::memset(grad, 0, size_t(p.num_experts) * sizeof(Element));
        Scalar total = Scalar(kWeightEpsilon), dot = 0, scores[16];
        for (int k = 0; k < p.top_k; ++k) {
          scores[k] = sigmoid(splat(load_scalar(logits + chosen[k])))[0];
          total += scores[k];
        }
        for (int k = 0; k < p.top_k; ++k) dot += upstream[k] * (scores[k] / total);
        for (int k = 0; k < p.top_k; ++k) {
          const Scalar score_grad = Scalar(p.scale) * (upstream[k] - dot) / total;
          store_scalar(grad + chosen[k], score_grad * scores[k] * (1 - scores[k]));
        }
      }
    });
  }
};

}  // namespace

void route_tokens(const RouteTokens& p, int num_threads) {
  if (p.dtype == DType::bf16) return Router<Bf16>::forward(p, num_threads);
  if (p.dtype == DType::f32) return Router<float>::forward(p, num_threads);
  Router<double>::forward(p, num_threads);
}

void route_tokens_backward(const RouteTokensBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return Router<Bf16>::backward(p, num_threads);
  if (p.dtype == DType::f32) return Router<float>::backward(p, num_threads);
  Router<double>::backward(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
