// Python's view of the ops that the CPU and CUDA share: one binding, instantiated once for each backend (and a third
// time by tests/cuda_on_cpu, over the executor). Addresses and streams travel as integers; shapes and dtypes are
// checked by k25sys.ops before they come here.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

#include "dispatch/api.h"
#include "fp8_gemm/api.h"
#include "fp8_quantize/api.h"
#include "grouped_gemm/api.h"
#include "plan_dispatch/api.h"
#include "policy_loss/api.h"
#include "pool_temporal_patches/api.h"
#include "route_tokens/api.h"
#include "swiglu/api.h"

namespace k25 {

namespace py = pybind11;

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Where is int (number of threads) on the CPU and Stream on CUDA.
template <class Where>
struct OpTable {
  void (*route_tokens)(const RouteTokens&, Where);
  void (*route_tokens_backward)(const RouteTokensBackward&, Where);
  void (*plan_dispatch)(const PlanDispatch&, Where);
  void (*dispatch)(const Dispatch&, Where);
  void (*combine)(const Combine&, Where);
  void (*combine_backward)(const CombineBackward&, Where);
  void (*swiglu)(const Swiglu&, Where);
  void (*swiglu_backward)(const SwigluBackward&, Where);
  void (*weighted_swiglu_backward)(const WeightedSwigluBackward&, Where);
  void (*token_losses)(const TokenLosses&, Where);
  void (*logit_stats)(const LogitStats&, Where);
  void (*logit_grad)(const LogitGrad&, Where);
  void (*loss_rows)(const LossRows&, Where);
  void (*quantize_fp8)(const QuantizeFp8&, Where);
  void (*dequantize_fp8)(const DequantizeFp8&, Where);
  void (*transpose_fp8)(const TransposeFp8&, Where);
  void (*pool_temporal_patches)(const PoolTemporalPatches&, Where);
  void (*pool_temporal_patches_backward)(const PoolTemporalPatchesBackward&, Where);
};

// Apart from the others: the executor builds the matrix products as a module of their own.
template <class Where>
struct ProductTable {
  void (*grouped_gemm)(const GroupedGemm&, Where);
  void (*grouped_gemm_weight_grads)(const GroupedGemmWeightGrads&, Where);
  void (*fp8_gemm)(const Fp8Gemm&, Where);
};

// How Python passes Where: a count of threads, or the stream's address.
template <class Where>
using WhereArgument = std::conditional_t<std::is_pointer_v<Where>, Address, int>;

template <class Where>
Where to_where(WhereArgument<Where> argument) {
  if constexpr (std::is_pointer_v<Where>) {
    return at<std::remove_pointer_t<Where>>(argument);
  } else {
    return argument;
  }
}

template <class Where>
void bind_routing(py::module_& module, const OpTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "route_tokens",
      [run = ops.route_tokens](Address logits, Address bias, Address weights, Address experts, int dtype,
                               int64_t num_tokens, int64_t num_experts, int top_k, double scale, W where) {
        run({at<void>(logits), at<float>(bias), at<void>(weights), at<int32_t>(experts), DType(dtype), num_tokens,
             num_experts, top_k, scale},
            to_where<Where>(where));
      },
      release());
  module.def(
      "route_tokens_backward",
      [run = ops.route_tokens_backward](Address grad_weights, Address logits, Address experts, Address grad_logits,
                                        int dtype, int64_t num_tokens, int64_t num_experts, int top_k, double scale,
                                        W where) {
        run({at<void>(grad_weights), at<void>(logits), at<int32_t>(experts), at<void>(grad_logits), DType(dtype),
             num_tokens, num_experts, top_k, scale},
            to_where<Where>(where));
      },
      release());
  module.def(
      "plan_dispatch",
      [run = ops.plan_dispatch](Address experts, bool experts_are_int64, int64_t num_tokens, int64_t num_experts,
                                int top_k, Address tokens_per_expert, Address offsets, Address slot_of_row,
                                Address row_of_slot, Address workspace, W where) {
        run({at<void>(experts), experts_are_int64, num_tokens, num_experts, top_k, at<int32_t>(tokens_per_expert),
             at<int32_t>(offsets), at<int32_t>(slot_of_row), at<int32_t>(row_of_slot), at<int32_t>(workspace)},
            to_where<Where>(where));
      },
      release());
}

template <class Where>
void bind_rows(py::module_& module, const OpTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "dispatch",
      [run = ops.dispatch](Address x, Address slot_of_row, Address rows, int64_t num_tokens, int64_t num_rows,
                           int64_t dim, int top_k, int dtype, W where) {
        run({at<void>(x), at<int32_t>(slot_of_row), at<void>(rows), num_tokens, num_rows, dim, top_k, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "combine",
      [run = ops.combine](Address rows, Address weights, Address row_of_slot, Address out, int64_t num_tokens,
                          int64_t num_rows, int64_t dim, int top_k, int dtype, W where) {
        run({at<void>(rows), at<void>(weights), at<int32_t>(row_of_slot), at<void>(out), num_tokens, num_rows, dim,
             top_k, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "combine_backward",
      [run = ops.combine_backward](Address grad_out, Address rows, Address weights, Address slot_of_row,
                                   Address grad_rows, Address grad_weights, int64_t num_tokens, int64_t num_rows,
                                   int64_t dim, int top_k, int dtype, W where) {
        run({at<void>(grad_out), at<void>(rows), at<void>(weights), at<int32_t>(slot_of_row), at<void>(grad_rows),
             at<void>(grad_weights), num_tokens, num_rows, dim, top_k, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "swiglu",
      [run = ops.swiglu](Address gate_up, Address act, int64_t num_rows, int64_t width, int dtype, W where) {
        run({at<void>(gate_up), at<void>(act), num_rows, width, DType(dtype)}, to_where<Where>(where));
      },
      release());
  module.def(
      "swiglu_backward",
      [run = ops.swiglu_backward](Address grad_act, Address gate_up, Address grad_gate_up, int64_t num_rows,
                                  int64_t width, int dtype, W where) {
        run({at<void>(grad_act), at<void>(gate_up), at<void>(grad_gate_up), num_rows, width, DType(dtype)},
            to_where<Where>(where));
      },
      release());
}

template <class Where>
void bind_weighted_swiglu(py::module_& module, const OpTable<Where>& ops) {
  module.def(
      "weighted_swiglu_backward",
      [run = ops.weighted_swiglu_backward](Address grad_act, Address gate_up, Address weights, Address slot_of_row,
                                           Address grad_gate_up, Address weighted_act, Address grad_weights,
                                           int64_t num_rows, int64_t width, int dtype, WhereArgument<Where> where) {
        run({at<void>(grad_act), at<void>(gate_up), at<void>(weights), at<int32_t>(slot_of_row), at<void>(grad_gate_up),
             at<void>(weighted_act), at<void>(grad_weights), num_rows, width, DType(dtype)},
            to_where<Where>(where));
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Where>
void bind_products(py::module_& module, const ProductTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "grouped_gemm",
      [run = ops.grouped_gemm](Address a, Address b, Address offsets, Address out, int64_t rows, int64_t columns,
                               int64_t depth, int64_t num_experts, bool b_is_transposed, int dtype, W where) {
        run({at<void>(a), at<void>(b), at<int32_t>(offsets), at<void>(out), rows, columns, depth, num_experts,
             b_is_transposed, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "grouped_gemm_weight_grads",
      [run = ops.grouped_gemm_weight_grads](Address a, Address b, Address offsets, Address out, int64_t rows,
                                            int64_t a_width, int64_t b_width, int64_t num_experts, bool accumulate,
                                            int dtype, int out_dtype, W where) {
        run({at<void>(a), at<void>(b), at<int32_t>(offsets), at<void>(out), rows, a_width, b_width, num_experts,
             accumulate, DType(dtype), DType(out_dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "fp8_gemm",
      [run = ops.fp8_gemm](Address a, Address a_scales, Address b, Address b_scales, Address offsets, Address out,
                           int64_t m, int64_t n, int64_t k, int64_t num_groups, int grouping, int out_dtype, W where) {
        run({at<uint8_t>(a), at<float>(a_scales), at<uint8_t>(b), at<float>(b_scales), at<int32_t>(offsets),
             at<void>(out), m, n, k, num_groups, Fp8Grouping(grouping), DType(out_dtype)},
            to_where<Where>(where));
      },
      release());
}

// (old_logprobs, advantages, weights, objective, log_low, log_high, tau, penalty_on_all)
using LossTokensTuple = std::tuple<Address, Address, Address, int, double, double, double, bool>;

inline LossTokens to_loss_tokens(const LossTokensTuple& t) {
  return {at<void>(std::get<0>(t)), at<void>(std::get<1>(t)), at<void>(std::get<2>(t)), Objective(std::get<3>(t)),
          std::get<4>(t),           std::get<5>(t),           std::get<6>(t),           std::get<7>(t)};
}

template <class Where>
void bind_losses(py::module_& module, const OpTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "token_losses",
      [run = ops.token_losses](const LossTokensTuple& tokens, Address logprobs, Address losses, Address slopes,
                               int64_t num_tokens, int dtype, W where) {
        run({to_loss_tokens(tokens), at<void>(logprobs), at<void>(losses), at<void>(slopes), num_tokens, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "logit_stats",
      [run = ops.logit_stats](Address logits, Address targets, Address weights, Address stats, int64_t num_tokens,
                              int64_t vocab, int64_t vocab_start, int dtype, W where) {
        run({at<void>(logits), at<int64_t>(targets), at<void>(weights), at<void>(stats), num_tokens, vocab, vocab_start,
             DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "logit_grad",
      [run = ops.logit_grad](Address logits, Address targets, Address log_sums, Address slopes, Address grad_logits,
                             int64_t num_tokens, int64_t vocab, int64_t vocab_start, int dtype, W where) {
        run({at<void>(logits), at<int64_t>(targets), at<void>(log_sums), at<void>(slopes), at<void>(grad_logits),
             num_tokens, vocab, vocab_start, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "loss_rows",
      [run = ops.loss_rows](const LossTokensTuple& tokens, Address logits, Address targets, Address logprobs,
                            Address entropies, Address losses, Address grad_logits, int64_t num_tokens, int64_t vocab,
                            int64_t vocab_start, int dtype, W where) {
        run({to_loss_tokens(tokens), at<void>(logits), at<int64_t>(targets), at<void>(logprobs), at<void>(entropies),
             at<void>(losses), at<void>(grad_logits), num_tokens, vocab, vocab_start, DType(dtype)},
            to_where<Where>(where));
      },
      release());
}

template <class Where>
void bind_fp8(py::module_& module, const OpTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "quantize_fp8",
      [run = ops.quantize_fp8](Address x, Address values, Address scales, Address values_transposed,
                               Address scales_transposed, int64_t batch, int64_t rows, int64_t cols, bool square,
                               bool power_of_two, int dtype, W where) {
        run({at<void>(x), at<uint8_t>(values), at<float>(scales), at<uint8_t>(values_transposed),
             at<float>(scales_transposed), batch, rows, cols, square, power_of_two, DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "dequantize_fp8",
      [run = ops.dequantize_fp8](Address values, Address scales, Address out, int64_t batch, int64_t rows, int64_t cols,
                                 bool square, int dtype, W where) {
        run({at<uint8_t>(values), at<float>(scales), at<void>(out), batch, rows, cols, square, DType(dtype)},
            to_where<Where>(where));
      },
      release());
}

template <class Where>
void bind_transpose_fp8(py::module_& module, const OpTable<Where>& ops) {
  module.def(
      "transpose_fp8",
      [run = ops.transpose_fp8](Address values, Address scales, Address values_transposed, Address scales_transposed,
                                int64_t batch, int64_t rows, int64_t cols, WhereArgument<Where> where) {
        run({at<uint8_t>(values), at<float>(scales), at<uint8_t>(values_transposed), at<float>(scales_transposed),
             batch, rows, cols},
            to_where<Where>(where));
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Where>
void bind_patches(py::module_& module, const OpTable<Where>& ops) {
  using release = py::call_guard<py::gil_scoped_release>;
  using W = WhereArgument<Where>;
  module.def(
      "pool_temporal_patches",
      [run = ops.pool_temporal_patches](Address x, Address clips, Address out, int64_t num_clips, int64_t num_patches,
                                        int64_t num_out, int64_t dim, int64_t merge_h, int64_t merge_w, int dtype,
                                        W where) {
        run({at<void>(x), at<Clip>(clips), at<void>(out), num_clips, num_patches, num_out, dim, merge_h, merge_w,
             DType(dtype)},
            to_where<Where>(where));
      },
      release());
  module.def(
      "pool_temporal_patches_backward",
      [run = ops.pool_temporal_patches_backward](Address grad_out, Address clips, Address grad_x, int64_t num_clips,
                                                 int64_t num_patches, int64_t num_out, int64_t dim, int64_t merge_h,
                                                 int64_t merge_w, int dtype, W where) {
        run({at<void>(grad_out), at<Clip>(clips), at<void>(grad_x), num_clips, num_patches, num_out, dim, merge_h,
             merge_w, DType(dtype)},
            to_where<Where>(where));
      },
      release());
}

template <class Where>
void bind_ops(py::module_& module, const OpTable<Where>& ops) {
  bind_routing(module, ops);
  bind_rows(module, ops);
  bind_weighted_swiglu(module, ops);
  bind_losses(module, ops);
  bind_fp8(module, ops);
  bind_transpose_fp8(module, ops);
  bind_patches(module, ops);
}

}  // namespace k25
