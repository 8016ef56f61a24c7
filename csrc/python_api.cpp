// The table of contents of k25sys._C: every native entry point is bound here or in bindings.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/cpu_isa.h"
#include "common/machine.h"
#include "common/threads.h"
#include "expert_mlp/api.h"
#include "linear_loss/api.h"
#if defined(K25_WITH_CUDA)
#include "common/cuda_device.h"
#endif

namespace {

using namespace k25;

void bind_expert_mlp(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.def(
      "expert_mlp",
      [](Address x, Address gate_up, Address down, Address packed_gate_up, Address packed_down, Address weights,
         Address offsets, Address slot_of_row, Address row_of_slot, Address gate_up_rows, Address act_rows,
         Address out_rows, Address out, int64_t num_tokens, int64_t num_experts, int64_t dim, int64_t width, int top_k,
         int dtype, Address phase_seconds, int num_threads) {
        cpu::expert_mlp({at<void>(x),
                         at<void>(gate_up),
                         at<void>(down),
                         at<void>(packed_gate_up),
                         at<void>(packed_down),
                         at<void>(weights),
                         at<int32_t>(offsets),
                         at<int32_t>(slot_of_row),
                         at<int32_t>(row_of_slot),
                         at<void>(gate_up_rows),
                         at<void>(act_rows),
                         at<void>(out_rows),
                         at<void>(out),
                         num_tokens,
                         num_experts,
                         dim,
                         width,
                         top_k,
                         DType(dtype),
                         at<double>(phase_seconds)},
                        num_threads);
      },
      release());
  module.def(
      "expert_mlp_backward",
      [](Address grad_out, Address x, Address gate_up, Address down, Address packed_gate_up, Address packed_down,
         Address weights, Address offsets, Address slot_of_row, Address row_of_slot, Address gate_up_rows,
         Address grad_gate_up_rows, Address weighted_act_rows, Address grad_x_rows, Address grad_x,
         Address grad_gate_up, Address grad_down, Address grad_weights, bool accumulate, int weight_grad_dtype,
         int64_t num_tokens, int64_t num_experts, int64_t dim, int64_t width, int top_k, int dtype,
         Address phase_seconds, int num_threads) {
        cpu::expert_mlp_backward({at<void>(grad_out),
                                  at<void>(x),
                                  at<void>(gate_up),
                                  at<void>(down),
                                  at<void>(packed_gate_up),
                                  at<void>(packed_down),
                                  at<void>(weights),
                                  at<int32_t>(offsets),
                                  at<int32_t>(slot_of_row),
                                  at<int32_t>(row_of_slot),
                                  at<void>(gate_up_rows),
                                  at<void>(grad_gate_up_rows),
                                  at<void>(weighted_act_rows),
                                  at<void>(grad_x_rows),
                                  at<void>(grad_x),
                                  at<void>(grad_gate_up),
                                  at<void>(grad_down),
                                  at<void>(grad_weights),
                                  accumulate,
                                  DType(weight_grad_dtype),
                                  num_tokens,
                                  num_experts,
                                  dim,
                                  width,
                                  top_k,
                                  DType(dtype),
                                  at<double>(phase_seconds)},
                                 num_threads);
      },
      release());
  module.def("packed_bytes", [](int64_t num_experts, int64_t rows, int64_t cols, int kind, int dtype) {
    return cpu::packed_bytes({nullptr, nullptr, num_experts, rows, cols, PackKind(kind), DType(dtype)});
  });
  module.def(
      "pack_weights",
      [](Address weights, Address packed, int64_t num_experts, int64_t rows, int64_t cols, int kind, int dtype,
         int num_threads) {
        cpu::pack_weights({at<void>(weights), at<void>(packed), num_experts, rows, cols, PackKind(kind), DType(dtype)},
                          num_threads);
      },
      release());
}

void bind_linear_loss(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.def(
      "linear_logits",
      [](Address hidden, Address head, Address targets, Address logits, Address stats, int64_t num_tokens,
         int64_t vocab, int64_t vocab_start, int64_t dim, int dtype, int num_threads) {
        cpu::linear_logits({at<void>(hidden), at<void>(head), at<int64_t>(targets), at<void>(logits), at<void>(stats),
                            num_tokens, vocab, vocab_start, dim, DType(dtype)},
                           num_threads);
      },
      release());
  module.def(
      "linear_grads",
      [](Address hidden, Address head, Address targets, Address log_sums, Address slopes, Address logits,
         Address grad_hidden, Address grad_head, Address grad_head_low, bool first, bool last, int64_t num_tokens,
         int64_t vocab, int64_t vocab_start, int64_t dim, int dtype, int grad_head_dtype, int num_threads) {
        cpu::linear_grads({at<void>(hidden), at<void>(head), at<int64_t>(targets), at<void>(log_sums), at<void>(slopes),
                           at<void>(logits), at<void>(grad_hidden), at<void>(grad_head), at<uint16_t>(grad_head_low),
                           first, last, num_tokens, vocab, vocab_start, dim, DType(dtype), DType(grad_head_dtype)},
                          num_threads);
      },
      release());
}

// The host's part of an op that the CPU and CUDA share.
void bind_clip_table(py::module_& module) {
  module.def("clip_table", [](Address grid, bool grid_is_int64, int64_t num_clips, int64_t num_patches, int64_t merge_h,
                              int64_t merge_w, Address clips) {
    return cpu::clip_table({at<void>(grid), grid_is_int64, num_clips, num_patches, merge_h, merge_w, at<Clip>(clips)});
  });
}

void bind_cpu_machine(py::module_& module) {
  module.def("isa", [] { return std::string(cpu::name_of(cpu::current_isa())); });
  module.def("set_isa", &cpu::set_isa);
  module.def("available_isas", [] {
    std::vector<std::string> names;
    for (const cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::name_of(isa));
    return names;
  });
  module.def("thread_runtime", &cpu::thread_runtime);
  module.def("advise_huge_pages",
             [](Address address, int64_t bytes) { cpu::advise_huge_pages(at<void>(address), bytes); });
  module.def("peak_gflops", &cpu::peak_gflops, py::call_guard<py::gil_scoped_release>());
}

py::dict cuda_info() {
  py::dict info;
#if defined(K25_WITH_CUDA)
  info["built"] = true;
  info["num_devices"] = cuda::num_devices();
#else
  info["built"] = false;
  info["num_devices"] = 0;
#endif
  info["reason"] = K25_CUDA_REASON;
  return info;
}

#if defined(K25_WITH_CUDA)
void bind_cuda(py::module_ module) {
  bind_products<Stream>(module, {cuda::grouped_gemm, cuda::grouped_gemm_weight_grads, cuda::fp8_gemm});
  bind_ops<Stream>(module, {cuda::route_tokens, cuda::route_tokens_backward, cuda::plan_dispatch, cuda::dispatch,
                            cuda::combine, cuda::combine_backward, cuda::swiglu, cuda::swiglu_backward,
                            cuda::weighted_swiglu_backward, cuda::token_losses, cuda::logit_stats, cuda::logit_grad,
                            cuda::loss_rows, cuda::quantize_fp8, cuda::dequantize_fp8, cuda::transpose_fp8,
                            cuda::pool_temporal_patches, cuda::pool_temporal_patches_backward});
  module.def("plan_dispatch_workspace", &cuda::plan_dispatch_workspace);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("version") = K25_VERSION;
  module.attr("compiler") = K25_COMPILER;

  module.def("cuda_info", &cuda_info);

  py::module_ cpu_module = module.def_submodule("cpu");
  bind_cpu_machine(cpu_module);
  bind_ops<int>(cpu_module, {cpu::route_tokens, cpu::route_tokens_backward, cpu::plan_dispatch, cpu::dispatch,
                             cpu::combine, cpu::combine_backward, cpu::swiglu, cpu::swiglu_backward,
                             cpu::weighted_swiglu_backward, cpu::token_losses, cpu::logit_stats, cpu::logit_grad,
                             cpu::loss_rows, cpu::quantize_fp8, cpu::dequantize_fp8, cpu::transpose_fp8,
                             cpu::pool_temporal_patches, cpu::pool_temporal_patches_backward});
  bind_expert_mlp(cpu_module);
  bind_products<int>(cpu_module, {cpu::grouped_gemm, cpu::grouped_gemm_weight_grads, cpu::fp8_gemm});
  bind_linear_loss(cpu_module);
  bind_clip_table(cpu_module);
#if defined(K25_WITH_CUDA)
  bind_cuda(module.def_submodule("cuda"));
#endif
}
