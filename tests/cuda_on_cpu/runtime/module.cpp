// The executor as a Python module: the same ops as k25sys._C.cuda, and what a test sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "executor.h"
#include "memory.h"
#include "ptx_launch.h"

namespace {

using namespace cuda_on_cpu;

void set_options(const std::string& order, uint64_t seed, const std::string& executor) {
  const Order orders[] = {Order::in_order, Order::reverse, Order::random};
  const char* names[] = {"in_order", "reverse", "random"};
  for (int i = 0; i < 3; ++i) {
    if (order == names[i]) options() = {orders[i], seed, executor == "ptx"};
  }
}

// Parameters travel as the bytes that a launch would copy.
void run_kernel(const std::string& symbol, int num_blocks, int num_threads, size_t shared_bytes,
                std::vector<std::string> parameters) {
  std::vector<void*> addresses;
  for (std::string& value : parameters) addresses.push_back(value.data());
  run_ptx_symbol(symbol, dim3(unsigned(num_blocks)), dim3(unsigned(num_threads)), shared_bytes, addresses.data());
}

}  // namespace

PYBIND11_MODULE(cuda_on_cpu_executor, module) {
  module.def("set_options", &set_options);
  module.def("register_buffer", &register_buffer);
  module.def("clear_buffers", &clear_buffers);
  module.def("ptx_symbols", &ptx_symbols);
  module.def("run_kernel", [](const std::string& symbol, int num_blocks, int num_threads, size_t shared_bytes,
                              const std::vector<pybind11::bytes>& parameters) {
    run_kernel(symbol, num_blocks, num_threads, shared_bytes, {parameters.begin(), parameters.end()});
  });
#if !defined(CUDA_ON_CPU_KERNELS_ONLY)
  namespace cuda = k25::cuda;
  k25::bind_ops<k25::Stream>(
      module, {cuda::route_tokens, cuda::route_tokens_backward, cuda::plan_dispatch, cuda::dispatch, cuda::combine,
               cuda::combine_backward, cuda::swiglu, cuda::swiglu_backward, cuda::token_losses, cuda::logit_stats,
               cuda::logit_grad, cuda::loss_rows, cuda::pool_temporal_patches, cuda::pool_temporal_patches_backward});
  module.def("plan_dispatch_workspace", &cuda::plan_dispatch_workspace);
#endif
}
