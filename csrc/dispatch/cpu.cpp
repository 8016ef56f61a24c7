#include "common/cpu/isa_functions.h"
#include "common/cpu/simd.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

template <class Element>
struct RowOps {
  using Scalar = typename Compute<Element>::Scalar;
  using Vector = typename Compute<Element>::Vector;
  static constexpr int lanes = sizeof(Vector) / sizeof(Scalar);

  static void combine(const Combine& p, int num_threads) {
    const auto* rows = static_cast<const Element*>(p.rows);
    const auto* weights = static_cast<const Scalar*>(p.weights);
    parallel_ranges(p.num_tokens, 8, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int32_t* row_of = p.row_of_slot + t * p.top_k;
        for (int64_t d = 0; d < p.dim; d += lanes) {
          Vector sum{};
          for (int k = 0; k < p.top_k; ++k) {
            const Vector row = load_partial(rows + row_of[k] * p.dim + d, p.dim - d);
            sum += weights ? row * weights[t * p.top_k + k] : row;
          }
          store_partial(static_cast<Element*>(p.out) + t * p.dim + d, sum, p.dim - d);
        }
      }
    });
  }

  static void combine_backward(const CombineBackward& p, int num_threads) {
    parallel_ranges(p.num_rows, 32, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int32_t slot = p.slot_of_row[m];
        const auto* grad = static_cast<const Element*>(p.grad_out) + slot / p.top_k * p.dim;
        const auto* row = static_cast<const Element*>(p.rows) + m * p.dim;
        const Scalar weight = static_cast<const Scalar*>(p.weights)[slot];
        Vector sum{};
        for (int64_t d = 0; d < p.dim; d += lanes) {
          const Vector g = load_partial(grad + d, p.dim - d);
          sum += g * load_partial(row + d, p.dim - d);
          store_partial(static_cast<Element*>(p.grad_rows) + m * p.dim + d, g * weight, p.dim - d);
        }
        static_cast<Scalar*>(p.grad_weights)[slot] = sum_lanes(sum);
      }
    });
  }
};

}  // namespace

void combine(const Combine& p, int num_threads) {
  if (p.dtype == DType::bf16) return RowOps<Bf16>::combine(p, num_threads);
  if (p.dtype == DType::f32) return RowOps<float>::combine(p, num_threads);
  RowOps<double>::combine(p, num_threads);
}

void combine_backward(const CombineBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return RowOps<Bf16>::combine_backward(p, num_threads);
  if (p.dtype == DType::f32) return RowOps<float>::combine_backward(p, num_threads);
  RowOps<double>::combine_backward(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
