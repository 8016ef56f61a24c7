#include "common/cpu/isa_functions.h"
#include "common/cpu/simd.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

constexpr int64_t kRowsPerTask = 16;

template <class Element>
void forward(const Swiglu& p, int num_threads) {
  using Vector = typename Compute<Element>::Vector;
  constexpr int lanes = sizeof(Vector) / sizeof(typename Compute<Element>::Scalar);
  parallel_ranges(p.num_rows, kRowsPerTask, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const Element*>(p.gate_up) + m * 2 * p.width;
      for (int64_t i = 0; i < p.width; i += lanes) {
        const Vector gate = load_partial(row + i, p.width - i);
        const Vector up = load_partial(row + p.width + i, p.width - i);
        store_partial(static_cast<Element*>(p.act) + m * p.width + i, gate * sigmoid(gate) * up, p.width - i);
      }
    }
  });
}

template <class Element>
void backward(const SwigluBackward& p, int num_threads) {
  using Vector = typename Compute<Element>::Vector;
  constexpr int lanes = sizeof(Vector) / sizeof(typename Compute<Element>::Scalar);
  parallel_ranges(p.num_rows, kRowsPerTask, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const Element*>(p.gate_up) + m * 2 * p.width;
      const auto* upstream = static_cast<const Element*>(p.grad_act) + m * p.width;
      auto* grad = static_cast<Element*>(p.grad_gate_up) + m * 2 * p.width;
      for (int64_t i = 0; i < p.width; i += lanes) {
        const int64_t n = p.width - i;
        const Vector gate = load_partial(row + i, n);
        const Vector up = load_partial(row + p.width + i, n);
        const Vector g = load_partial(upstream + i, n);
        const Vector s = sigmoid(gate);
        const Vector silu = gate * s;
        store_partial(grad + i, g * up * (s + silu * (1 - s)), n);
        store_partial(grad + p.width + i, g * silu, n);
      }
    }
  });
}

template <class Element>
void weighted_backward(const WeightedSwigluBackward& p, int num_threads) {
  using Vector = typename Compute<Element>::Vector;
  using Scalar = typename Compute<Element>::Scalar;
  constexpr int lanes = sizeof(Vector) / sizeof(Scalar);
  parallel_ranges(p.num_rows, kRowsPerTask, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const auto* row = static_cast<const Element*>(p.gate_up) + m * 2 * p.width;
      const auto* upstream = static_cast<const Element*>(p.grad_act) + m * p.width;
      auto* grad = static_cast<Element*>(p.grad_gate_up) + m * 2 * p.width;
      auto* act = static_cast<Element*>(p.weighted_act) + m * p.width;
      const Scalar weight = static_cast<const Scalar*>(p.weights)[p.slot_of_row[m]];
      Vector sum{};
      for (int64_t i = 0; i < p.width; i += lanes) {
        const int64_t n = p.width - i;
        const Vector gate = load_partial(row + i, n), up = load_partial(row + p.width + i, n);
        const Vector g = load_partial(upstream + i, n), s = sigmoid(gate);
        const Vector silu = gate * s, value = silu * up, weighted = g * weight;
        sum += g * value;
        store_partial(grad + i, weighted * up * (s + silu * (1 - s)), n);
        store_partial(grad + p.width + i, weighted * silu, n);
        store_partial(act + i, value * weight, n);
      }
      if (p.grad_weights) static_cast<Scalar*>(p.grad_weights)[p.slot_of_row[m]] = sum_lanes(sum);
    }
  });
}

}  // namespace

void weighted_swiglu_backward(const WeightedSwigluBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return weighted_backward<Bf16>(p, num_threads);
  if (p.dtype == DType::f32) return weighted_backward<float>(p, num_threads);
  weighted_backward<double>(p, num_threads);
}

void swiglu(const Swiglu& p, int num_threads) {
  if (p.dtype == DType::bf16) return forward<Bf16>(p, num_threads);
  if (p.dtype == DType::f32) return forward<float>(p, num_threads);
  forward<double>(p, num_threads);
}

void swiglu_backward(const SwigluBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return backward<Bf16>(p, num_threads);
  if (p.dtype == DType::f32) return backward<float>(p, num_threads);
  backward<double>(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
