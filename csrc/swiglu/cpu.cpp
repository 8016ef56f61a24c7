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

}  // namespace

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
