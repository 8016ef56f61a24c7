#include <type_traits>

#include "common/cpu/isa_functions.h"
#include "grouped_gemm/matrices.h"

namespace k25::cpu::K25_ISA {
namespace {

template <class Math>
void multiply(const GroupedGemm& p, int num_threads) {
  using Element = typename Math::Element;
  using Scalar = typename Tile<Math>::Scalar;
  const Rows<Element> a{static_cast<const Element*>(p.a), p.depth};
  for_each_panel_task(p.offsets, p.num_experts, Panels<Math>::count(p.columns), num_threads, [&](const PanelTask& t) {
    const auto* matrix = static_cast<const Element*>(p.b) + t.expert * p.columns * p.depth;
    const auto run = [&](const auto& pack) {
      multiply_expert_rows<Math>(a, p.offsets[t.expert], p.offsets[t.expert + 1], p.depth, t, nullptr, pack,
                                 [&](int64_t row, int count, int64_t panel, const Scalar* c) {
                                   store_tile<Math>(static_cast<Element*>(p.out), p.columns, row, count, panel, c,
                                                    [](int64_t) { return Scalar(1); });
                                 });
    };
    if (p.b_is_transposed) return run(PackColumns<Math>{matrix, p.columns});
    run(PackRows<Math>{matrix, p.depth, p.columns, false});
  });
}

template <class Math>
void weight_grads(const GroupedGemmWeightGrads& p, int num_threads) {
  using Element = typename Math::Element;
  using Scalar = typename Tile<Math>::Scalar;
  const Rows<Element> a{static_cast<const Element*>(p.a), p.a_width}, b{static_cast<const Element*>(p.b), p.b_width};
  const auto run = [&](auto* kind) {
    using Grad = std::remove_pointer_t<decltype(kind)>;
    multiply_weight_grads<Math>(a, b, p.offsets, p.num_experts, p.accumulate, static_cast<Grad*>(p.out), num_threads);
  };
  if (p.out_dtype == p.dtype) return run(static_cast<Element*>(nullptr));
  run(static_cast<Scalar*>(nullptr));
}

}  // namespace

void grouped_gemm(const GroupedGemm& p, int num_threads) {
  if (p.dtype == DType::bf16) return multiply<Bf16Math>(p, num_threads);
  if (p.dtype == DType::f32) return multiply<F32Math>(p, num_threads);
  multiply<F64Math>(p, num_threads);
}

void grouped_gemm_weight_grads(const GroupedGemmWeightGrads& p, int num_threads) {
  if (p.dtype == DType::bf16) return weight_grads<Bf16Math>(p, num_threads);
  if (p.dtype == DType::f32) return weight_grads<F32Math>(p, num_threads);
  weight_grads<F64Math>(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
