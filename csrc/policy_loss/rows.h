// One row of logits: its log-sum-exp and what the loss and its gradient need of it.
#pragma once
#include "common/cpu/simd.h"
#include "policy_loss/api.h"

namespace k25::cpu::K25_ISA {

template <class S>
struct RowStats {
  S max, sum, weighted, target;  // sum of exp(x - max), of exp(x - max) (x - max); target's logit, -inf where not here
};

template <class S>
K25_INLINE S log_of(S value) {
  return S(__builtin_log(double(value)));
}
template <class S>
K25_INLINE S exp_of(S value) {
  return S(__builtin_exp(double(value)));
}

constexpr float kLeastExponent = -87.0f;  // exp of what is less would need a subnormal

// exp(x) for kLeastExponent <= x <= 0 (or NaN), to 2 ulp.
K25_INLINE F32V exp_below_zero(F32V x) {
  const F32V magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in the low bits
  const F32V shifted = x * 1.44269504088896341f + magic;
  const F32V n = shifted - magic;
  const F32V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F32V p = splat(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return (F32V)((I32V)p + ((I32V)shifted << 23));
}
K25_INLINE F64V exp_below_zero(F64V x) { return exp(x); }

// x - max, but no less than what exp_below_zero takes: a forbidden token (-inf) gets a probability below 1e-37.
template <class V, class S>
K25_INLINE V below_zero(V x, S max) {
  return larger(splat(S(kLeastExponent)), x - max);
}
template <class V>
K25_INLINE V below_zero(V x, V max) {
  return larger(splat(decltype(x[0] + 0)(kLeastExponent)), x - max);
}

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
  static S max_of(const Element* row, int64_t vocab) {
    constexpr int at_once = 4;
    Vector best[at_once];
    for (int v = 0; v < at_once; ++v) best[v] = splat(S(-__builtin_inff()));
    int64_t i = 0;
    for (; i + at_once * lanes <= vocab; i += at_once * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < at_once; ++v) best[v] = larger(load_compute(row + i + v * lanes), best[v]);
    }
    for (; i < vocab; i += lanes) best[0] = larger(load_logits(row + i, vocab - i), best[0]);
    for (int v = 1; v < at_once; ++v) best[0] = larger(best[v], best[0]);
    S max = best[0][0];
    for (int i = 1; i < lanes; ++i) max = best[0][i] > max ? best[0][i] : max;
    return max;
  }

  // Also keeps every exp(x - max) in `kept`, unless that is null; it may be the row itself.
  template <bool kKeep>
  static RowStats<S> stats(const Element* row, int64_t vocab, int64_t target, S* kept) {
    const S infinity = __builtin_inff();
    const S max = max_of(row, vocab);
    const S at_target = target >= 0 && target < vocab ? load_scalar(row + target) : -infinity;
    if (max == -infinity) return {max, 0, 0, at_target};  // no logit is above -inf, or all are NaN
    Vector sums[2] = {}, weighted[2] = {};
    const auto add = [&](int v, Vector x) {
      const Vector below = below_zero(x, max);
      const Vector e = exp_below_zero(below);
      sums[v] += e;
      weighted[v] += e * below;
      return e;
    };
    int64_t i = 0;
    for (; i + 2 * lanes <= vocab; i += 2 * lanes) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vector e = add(v, load_compute(row + i + v * lanes));
        if (kKeep) store(kept + i + v * lanes, e);
      }
    }
    for (; i < vocab; i += lanes) {
      const Vector e = add(0, load_logits(row + i, vocab - i));
      if (kKeep) store_partial(kept + i, e, vocab - i);
    }
    return {max, sum_lanes(sums[0] + sums[1]), sum_lanes(weighted[0] + weighted[1]), at_target};
  }

  static void set_target(Element* out, int64_t vocab, int64_t target, S at_target, S log_sum, S slope) {
    if (target >= 0 && target < vocab) store_scalar(out + target, slope * (1 - exp_of(at_target - log_sum)));
  }

  // slope (1[v = target] - exp(x - log_sum)); no logit is above log_sum but by its rounding.
  static void grad(const Element* row, Element* out, int64_t vocab, int64_t target, S log_sum, S slope) {
    if (slope == 0) return zero(out, vocab);
    const S at_target = target >= 0 && target < vocab ? load_scalar(row + target) : S(0);
    int64_t i = 0;
    for (; i + 2 * lanes <= vocab; i += 2 * lanes) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vector x = load_compute(row + i + v * lanes);
        store_compute(out + i + v * lanes, exp_below_zero(below_zero(x, log_sum)) * -slope);
      }
    }
    for (; i < vocab; i += lanes) {
      const Vector x = load_partial(row + i, vocab - i);
      store_partial(out + i, exp_below_zero(below_zero(x, log_sum)) * -slope, vocab - i);
    }
    set_target(out, vocab, target, at_target, log_sum, slope);
  }

  // The same from what `stats` kept, which may be `out` itself; streams where it may, so stream_fence() is needed.
  static void grad_of_kept(const S* kept, Element* out, int64_t vocab, int64_t target, const RowStats<S>& stats,
                           S log_sum, S slope) {
    if (slope == 0) return zero(out, vocab);
    const S scale = -slope / stats.sum;
    constexpr int64_t line = 64, step = line / int64_t(sizeof(Element));
    const bool streams = static_cast<const void*>(kept) != out && reinterpret_cast<uintptr_t>(out) % line == 0;
    int64_t i = 0;
    for (; i + step <= vocab; i += step) {
#pragma GCC unroll 8
      for (int64_t j = i; j < i + step; j += lanes) {
        const Vector value = load<Vector>(kept + j) * scale;
        if (streams) {
          stream_compute(out + j, value);
        } else {
          store_compute(out + j, value);
        }
      }
    }
    for (; i < vocab; i += lanes) store_partial(out + i, load_partial(kept + i, vocab - i) * scale, vocab - i);
    set_target(out, vocab, target, stats.target, log_sum, slope);
  }

  static void zero(Element* out, int64_t vocab) {
    std::memset(static_cast<void*>(out), 0, size_t(vocab) * sizeof(Element));
  }
};

}  // namespace k25::cpu::K25_ISA
