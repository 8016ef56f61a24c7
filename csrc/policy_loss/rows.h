// One row of logits: its log-sum-exp and what the loss and its gradient need of it.
#pragma once
#include "common/cpu/simd.h"
#include "policy_loss/api.h"

namespace k25::cpu::K25_ISA {

template <class S>
struct RowStats {
  S max, sum, weighted, target;  // sum of exp(x - max), sum of exp(x - max) x; target's logit, -inf where not here
};

template <class S>
K25_INLINE S log_of(S value) {
  return S(__builtin_log(double(value)));
}
template <class S>
K25_INLINE S exp_of(S value) {
  return S(__builtin_exp(double(value)));
}

// exp(x) for x <= 0 (or NaN), to 2 ulp; what underflows becomes a number below 1e-37.
K25_INLINE F32V exp_below_zero(F32V x) {
  const F32V clamped = x < -87.0f ? splat(-87.0f) : x;
  const F32V magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const F32V shifted = clamped * 1.44269504088896341f + magic;
  const F32V n = shifted - magic;
  const F32V r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  F32V p = splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (F32V)((I32V)p + ((I32V)shifted << 23));
}
K25_INLINE F64V exp_below_zero(F64V x) { return exp(x); }

// Lowest value of the lanes past the end, so that they add nothing.
template <class Element>
K25_INLINE typename Compute<Element>::Vector load_logits(const Element* row, int64_t left) {
  using Vector = typename Compute<Element>::Vector;
  constexpr int lanes = sizeof(Vector) / sizeof(typename Compute<Element>::Scalar);
  Vector out = load_partial(row, left);
  for (int64_t i = left; i < lanes; ++i) out[i] = -__builtin_inff();
  return out;
}

template <class Element>
struct LossRow {
  using S = typename Compute<Element>::Scalar;
  using Vector = typename Compute<Element>::Vector;
  static constexpr int lanes = sizeof(Vector) / sizeof(S);
  static constexpr int kAtOnce = 4;

  static K25_INLINE Vector bigger(Vector a, Vector b) { return a > b ? a : b; }

  static S max_of(const Element* row, int64_t vocab) {
    Vector best[kAtOnce];
    for (int v = 0; v < kAtOnce; ++v) best[v] = splat(S(-__builtin_inff()));
    int64_t i = 0;
    for (; i + kAtOnce * lanes <= vocab; i += kAtOnce * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) best[v] = bigger(load_compute(row + i + v * lanes), best[v]);
    }
    for (; i < vocab; i += lanes) best[0] = bigger(load_logits(row + i, vocab - i), best[0]);
    for (int v = 1; v < kAtOnce; ++v) best[0] = bigger(best[v], best[0]);
    S max = best[0][0];
    for (int i = 1; i < lanes; ++i) max = best[0][i] > max ? best[0][i] : max;
    return max;
  }

  static RowStats<S> stats(const Element* row, int64_t vocab, int64_t target) {
    const S infinity = __builtin_inff();
    const S max = max_of(row, vocab);
    const S at_target = target >= 0 && target < vocab ? load_scalar(row + target) : -infinity;
    if (max == -infinity) return {max, 0, 0, at_target};  // no logit is above -inf, or all are NaN
    Vector sums[kAtOnce] = {}, weighted[kAtOnce] = {};
    const auto add = [&](int v, Vector x) {
      const Vector e = exp_below_zero(x - max);
      sums[v] += e;
      weighted[v] += e * (x < S(-1e30) ? Vector{} : x);  // a forbidden token (-inf) has probability 0
    };
    int64_t i = 0;
    for (; i + kAtOnce * lanes <= vocab; i += kAtOnce * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < kAtOnce; ++v) add(v, load_compute(row + i + v * lanes));
    }
    for (; i < vocab; i += lanes) add(0, load_logits(row + i, vocab - i));
    for (int v = 1; v < kAtOnce; ++v) {
      sums[0] += sums[v];
      weighted[0] += weighted[v];
    }
    return {max, sum_lanes(sums[0]), sum_lanes(weighted[0]), at_target};
  }

  // slope (1[v = target] - exp(x - log_sum)); no logit is above log_sum but by its rounding.
  static void grad(const Element* row, Element* out, int64_t vocab, int64_t target, S log_sum, S slope) {
    if (slope == 0) {
      std::memset(static_cast<void*>(out), 0, size_t(vocab) * sizeof(Element));
      return;
    }
    const bool here = target >= 0 && target < vocab;
    const S at_target = here ? load_scalar(row + target) : S(0);
    int64_t i = 0;
    for (; i + 2 * lanes <= vocab; i += 2 * lanes) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vector x = load_compute(row + i + v * lanes) - log_sum;
        store_compute(out + i + v * lanes, exp_below_zero(x) * -slope);
      }
    }
    for (; i < vocab; i += lanes) {
      store_partial(out + i, exp_below_zero(load_partial(row + i, vocab - i) - log_sum) * -slope, vocab - i);
    }
    if (here) store_scalar(out + target, slope * (1 - exp_of(at_target - log_sum)));
  }
};

}  // namespace k25::cpu::K25_ISA
