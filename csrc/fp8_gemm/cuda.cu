#include <stdexcept>

#include "fp8_gemm/api.h"
#include "gemm/api.h"

namespace k25::cuda {

void fp8_gemm(const Fp8Gemm& p, Stream stream) {
  switch (p.grouping) {
    case Fp8Grouping::rows:
      return gemm_fp8({p.a, p.b, p.a_scales, p.b_scales, p.offsets, p.out, p.m, p.n, p.k, p.num_groups, p.out_dtype},
                      stream);
    case Fp8Grouping::rows_transposed:
      throw std::invalid_argument("fp8_gemm: the tensor cores need b along the reduction: transpose_fp8 gives it");
    case Fp8Grouping::reduction:
      return gemm_fp8_weight_grads(
          {p.a, p.b, p.a_scales, p.b_scales, p.offsets, p.out, p.k, p.m, p.n, p.num_groups, false, p.out_dtype},
          stream);
  }
}

}  // namespace k25::cuda
