#include "gemm/launch.cuh"

namespace k25::cuda {
namespace {

template <GemmKind kKind>
void launch_bf16(const GemmCall& call, Stream stream) {
  const int width = choose_tile_n(call, kBf16Widths);
  if (width == 64) return launch_gemm<GemmConfig<Bf16Operands, 64, kKind>>(call, stream);
  if (width == 128) return launch_gemm<GemmConfig<Bf16Operands, 128, kKind>>(call, stream);
  launch_gemm<GemmConfig<Bf16Operands, 256, kKind>>(call, stream);
}

}  // namespace

void gemm_bf16(const GemmBf16& p, Stream stream) {
  const GemmCall call = call_of(p);
  check_size("gemm_bf16", "depth", p.depth, 1, 8);
  if (!check_gemm("gemm_bf16", call)) return;
  if (!p.b_is_transposed) return launch_bf16<GemmKind::rows>(call, stream);
  check_size("gemm_bf16", "columns of a transposed b", p.columns, 0, 8);
  launch_bf16<GemmKind::transposed_b>(call, stream);
}

void gemm_fp8(const GemmFp8& p, Stream stream) {
  const GemmCall call = call_of(p);
  check_size("gemm_fp8", "depth", p.depth, 1, 16);
  if (!check_gemm("gemm_fp8", call)) return;
  const int width = choose_tile_n(call, kFp8Widths);
  if (width == 64) return launch_gemm<GemmConfig<E4m3Operands, 64>>(call, stream);
  if (width == 128) return launch_gemm<GemmConfig<E4m3Operands, 128>>(call, stream);
  launch_gemm<GemmConfig<E4m3Operands, 192>>(call, stream);
}

void gemm_bf16_weight_grads(const GemmBf16WeightGrads& p, Stream stream) {
  const GemmCall call = call_of(p);
  check_size("gemm_bf16_weight_grads", "rows", p.rows, 1, 1);
  check_size("gemm_bf16_weight_grads", "a_width", p.a_width, 0, 8);
  check_size("gemm_bf16_weight_grads", "b_width", p.b_width, 0, 8);
  if (!check_gemm("gemm_bf16_weight_grads", call)) return;
  const int width = choose_tile_n(call, kBf16WeightGradWidths);
  if (width == 128) return launch_gemm<GemmConfig<Bf16Operands, 128, GemmKind::weight_grads>>(call, stream);
  launch_gemm<GemmConfig<Bf16Operands, 256, GemmKind::weight_grads>>(call, stream);
}

void gemm_fp8_weight_grads(const GemmFp8WeightGrads& p, Stream stream) {
  const GemmCall call = call_of(p);
  check_size("gemm_fp8_weight_grads", "rows", p.rows, 1, 16);
  if (!check_gemm("gemm_fp8_weight_grads", call)) return;
  const int width = choose_tile_n(call, kFp8Widths);
  if (width == 64) return launch_gemm<GemmConfig<E4m3Operands, 64, GemmKind::weight_grads>>(call, stream);
  if (width == 128) return launch_gemm<GemmConfig<E4m3Operands, 128, GemmKind::weight_grads>>(call, stream);
  launch_gemm<GemmConfig<E4m3Operands, 192, GemmKind::weight_grads>>(call, stream);
}

}  // namespace k25::cuda
