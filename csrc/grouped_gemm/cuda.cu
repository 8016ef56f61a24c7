#include <stdexcept>
#include <string>

#include "gemm/api.h"
#include "grouped_gemm/api.h"

namespace k25::cuda {
namespace {

void require_bf16(const char* op, DType dtype) {
  if (dtype != DType::bf16) throw std::invalid_argument(std::string(op) + ": the tensor cores multiply bf16");
}

}  // namespace

void grouped_gemm(const GroupedGemm& p, Stream stream) {
  require_bf16("grouped_gemm", p.dtype);
  gemm_bf16({p.a, p.b, p.offsets, p.out, p.rows, p.columns, p.depth, p.num_experts, p.b_is_transposed, p.dtype},
            stream);
}

void grouped_gemm_weight_grads(const GroupedGemmWeightGrads& p, Stream stream) {
  require_bf16("grouped_gemm_weight_grads", p.dtype);
  gemm_bf16_weight_grads(
      {p.a, p.b, p.offsets, p.out, p.rows, p.a_width, p.b_width, p.num_experts, p.accumulate, p.out_dtype}, stream);
}

}  // namespace k25::cuda
