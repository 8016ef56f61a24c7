// The executor as a Python module: the same ops as k25sys._C.cuda, and what a test sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "counts.h"
#include "cuda_on_cpu.h"
#include "executor.h"
#include "gemm/api.h"
#include "memory.h"
#include "ptx_launch.h"

namespace {

using namespace cuda_on_cpu;

void set_options(const std::string& order, uint64_t seed, const std::string& executor, bool lazy) {
  const Order orders[] = {Order::in_order, Order::reverse, Order::random};
  const char* names[] = {"in_order", "reverse", "random"};
  for (int i = 0; i < 3; ++i) {
    if (order == names[i]) options() = {orders[i], seed, executor == "ptx", lazy};
  }
}

struct alignas(128) Parameter {
  uint8_t bytes[128];
};

// The 128 bytes of a tensor map; sizes and box from the innermost dimension on, strides in bytes from the next one on.
pybind11::bytes tensor_map(uint64_t address, int type, const std::vector<uint64_t>& sizes,
                           const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box, int swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  const std::vector<uint32_t> element_strides(sizes.size(), 1);
  CUtensorMap map;
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CUtensorMapDataType(type), uint32_t(sizes.size()), reinterpret_cast<void*>(address), sizes.data(),
      strides.data(), box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw Error("cuTensorMapEncodeTiled: CUresult " + std::to_string(int(status)));
  return {reinterpret_cast<const char*>(&map), sizeof(map)};
}

// Parameters travel as the bytes that a launch would copy.
void run_kernel(const std::string& symbol, int num_blocks, int num_threads, size_t shared_bytes,
                std::vector<std::string> parameters) {
  std::vector<Parameter> copies(parameters.size());
  std::vector<void*> addresses;
  for (size_t i = 0; i < copies.size(); ++i) {
    std::memcpy(copies[i].bytes, parameters[i].data(), std::min(parameters[i].size(), sizeof(Parameter)));
    addresses.push_back(&copies[i]);
  }
  run_ptx_symbol(symbol, dim3(unsigned(num_blocks)), dim3(unsigned(num_threads)), shared_bytes, addresses.data());
}

pybind11::dict counts_as_dicts() {
  pybind11::dict all;
  for (const auto& [symbol, c] : counts_by_symbol()) {
    pybind11::dict one;
    one["launches"] = c.launches;
    one["loaded_bytes"] = c.loaded_bytes;
    one["stored_bytes"] = c.stored_bytes;
    one["bulk_loaded_bytes"] = c.bulk_loaded_bytes;
    one["bulk_stored_bytes"] = c.bulk_stored_bytes;
    one["bf16_flop"] = c.bf16_flop;
    one["e4m3_flop"] = c.e4m3_flop;
    one["num_blocks"] = c.num_blocks;
    one["num_threads"] = c.num_threads;
    one["shared_bytes"] = c.shared_bytes;
    all[symbol.c_str()] = one;
  }
  return all;
}

#if defined(CUDA_ON_CPU_GEMM)
void bind_gemm(pybind11::module_& module) {
  using namespace k25;
  module.def("gemm_bf16", [](Address a, Address b, Address offsets, Address out, int64_t rows, int64_t columns,
                             int64_t depth, int64_t num_experts, bool b_is_transposed, int out_dtype, Address) {
    cuda::gemm_bf16({at<void>(a), at<void>(b), at<int32_t>(offsets), at<void>(out), rows, columns, depth, num_experts,
                     b_is_transposed, DType(out_dtype)},
                    nullptr);
  });
  module.def("gemm_bf16_weight_grads",
             [](Address a, Address b, Address offsets, Address out, int64_t rows, int64_t a_width, int64_t b_width,
                int64_t num_experts, bool accumulate, int out_dtype, Address) {
               cuda::gemm_bf16_weight_grads({at<void>(a), at<void>(b), at<int32_t>(offsets), at<void>(out), rows,
                                             a_width, b_width, num_experts, accumulate, DType(out_dtype)},
                                            nullptr);
             });
  module.def("gemm_fp8_weight_grads",
             [](Address a, Address b, Address a_scales, Address b_scales, Address offsets, Address out, int64_t rows,
                int64_t a_width, int64_t b_width, int64_t num_experts, bool accumulate, int out_dtype, Address) {
               cuda::gemm_fp8_weight_grads(
                   {at<void>(a), at<void>(b), at<float>(a_scales), at<float>(b_scales), at<int32_t>(offsets),
                    at<void>(out), rows, a_width, b_width, num_experts, accumulate, DType(out_dtype)},
                   nullptr);
             });
  module.def("gemm_fp8", [](Address a, Address b, Address a_scales, Address b_scales, Address offsets, Address out,
                            int64_t rows, int64_t columns, int64_t depth, int64_t num_experts, int out_dtype, Address) {
    cuda::gemm_fp8({at<void>(a), at<void>(b), at<float>(a_scales), at<float>(b_scales), at<int32_t>(offsets),
                    at<void>(out), rows, columns, depth, num_experts, DType(out_dtype)},
                   nullptr);
  });
}
#endif

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_executor, module) {
  module.def("set_options", &set_options, pybind11::arg("order"), pybind11::arg("seed"), pybind11::arg("executor"),
             pybind11::arg("lazy") = false);
  module.def("register_buffer", &register_buffer);
  module.def("clear_buffers", &clear_buffers);
  module.def("ptx_symbols", &ptx_symbols);
  module.def("clear_counts", &clear_counts);
  module.def("counts", &counts_as_dicts);
  module.def("tensor_map", &tensor_map);
  module.def("last_kernel", &last_kernel);
  module.def("run_kernel", [](const std::string& symbol, int num_blocks, int num_threads, size_t shared_bytes,
                              const std::vector<pybind11::bytes>& parameters) {
    run_kernel(symbol, num_blocks, num_threads, shared_bytes, {parameters.begin(), parameters.end()});
  });
#if defined(CUDA_ON_CPU_ROUTING)
  namespace cuda = k25::cuda;
  k25::bind_ops<k25::Stream>(
      module,
      {cuda::route_tokens, cuda::route_tokens_backward, cuda::plan_dispatch, cuda::dispatch, cuda::combine,
       cuda::combine_backward, cuda::swiglu, cuda::swiglu_backward, cuda::weighted_swiglu_backward, cuda::token_losses,
       cuda::logit_stats, cuda::logit_grad, cuda::loss_rows, cuda::quantize_fp8, cuda::dequantize_fp8,
       cuda::transpose_fp8, cuda::pool_temporal_patches, cuda::pool_temporal_patches_backward});
  module.def("plan_dispatch_workspace", &cuda::plan_dispatch_workspace);
#endif
#if defined(CUDA_ON_CPU_GEMM)
  bind_gemm(module);
#endif
#if defined(CUDA_ON_CPU_PRODUCTS)
  k25::bind_products<k25::Stream>(module,
                                  {k25::cuda::grouped_gemm, k25::cuda::grouped_gemm_weight_grads, k25::cuda::fp8_gemm});
#endif
}
