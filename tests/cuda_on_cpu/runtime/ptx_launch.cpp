#include "ptx_launch.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <map>

#include "counts.h"
#include "memory.h"
#include "ptx_semantics.h"

namespace cuda_on_cpu {
namespace {

std::map<std::string, PtxKernel>& table() {
  static std::map<std::string, PtxKernel> kernels;
  return kernels;
}

std::string readable(const std::string& symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : symbol;
  std::free(name);
  return result;
}

struct PtxCall {
  PtxKernel kernel;
  void* const* parameters;
  static void run(void* context) {
    const auto& call = *static_cast<const PtxCall*>(context);
    call.kernel(call.parameters);
  }
};

}  // namespace

Registration::Registration(const char* symbol, PtxKernel kernel) { table()[symbol] = kernel; }

std::vector<std::string> ptx_symbols() {
  std::vector<std::string> symbols;
  for (const auto& entry : table()) symbols.push_back(entry.first);
  return symbols;
}

std::string symbol_of(void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname)
    throw Error("a launched kernel has no symbol: is it in an unnamed namespace?");
  return info.dli_sname;
}

void run_ptx_symbol(const std::string& symbol, dim3 grid, dim3 block, size_t shared_bytes, void* const* parameters) {
  const auto found = table().find(symbol);
  if (found == table().end()) throw Error("no PTX was translated for " + readable(symbol));
  options().use_ptx = true;
  start_launch_memory();
  start_launch_counts(symbol, grid, block, shared_bytes);
  PtxCall call{found->second, parameters};
  run_grid(readable(symbol), grid, block, shared_bytes, &PtxCall::run, &call);
}

void run_ptx(void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* const* parameters) {
  run_ptx_symbol(symbol_of(kernel), grid, block, shared_bytes, parameters);
}

}  // namespace cuda_on_cpu
