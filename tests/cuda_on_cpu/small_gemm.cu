// One kernel, for the planted bugs: a small part of the build time of csrc/gemm/cuda.cu. K25_INSTANCE says which.
#include "gemm/launch.cuh"

namespace k25::cuda {

void gemm_bf16([[maybe_unused]] const GemmBf16& p, [[maybe_unused]] Stream stream) {
#if K25_INSTANCE == 0
  launch_gemm<GemmConfig<Bf16Operands, 64>>(call_of(p), stream);
#elif K25_INSTANCE == 1
  launch_gemm<GemmConfig<Bf16Operands, 128, GemmKind::transposed_b>>(call_of(p), stream);
#endif
}

void gemm_fp8([[maybe_unused]] const GemmFp8& p, [[maybe_unused]] Stream stream) {
#if K25_INSTANCE == 2
  launch_gemm<GemmConfig<E4m3Operands, 192>>(call_of(p), stream);
#endif
}

void gemm_bf16_weight_grads([[maybe_unused]] const GemmBf16WeightGrads& p, [[maybe_unused]] Stream stream) {
#if K25_INSTANCE == 3 || K25_INSTANCE == 5
  launch_gemm<GemmConfig<Bf16Operands, 128, GemmKind::weight_grads>>(call_of(p), stream);
#endif
}

void gemm_fp8_weight_grads([[maybe_unused]] const GemmFp8WeightGrads& p, [[maybe_unused]] Stream stream) {
#if K25_INSTANCE == 4
  launch_gemm<GemmConfig<E4m3Operands, 64, GemmKind::weight_grads>>(call_of(p), stream);
#endif
}

}  // namespace k25::cuda
