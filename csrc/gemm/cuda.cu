#include "gemm/launch.cuh"

namespace k25::cuda {
namespace {

template <int kTileN, bool kTransposedB>
using Bf16Config = GemmConfig<Bf16Operands, kTileN, kTransposedB>;
template <int kTileN>
using Fp8Config = GemmConfig<E4m3Operands, kTileN, false>;

template <bool kTransposedB>
void launch_bf16(const GemmCall& call, Stream stream) {
  const int width = choose_tile_n(call, {64, 128, 256});
  if (width == 64) return launch_gemm<Bf16Config<64, kTransposedB>>(call, stream);
  if (width == 128) return launch_gemm<Bf16Config<128, kTransposedB>>(call, stream);
  launch_gemm<Bf16Config<256, kTransposedB>>(call, stream);
}

}  // namespace

void gemm_bf16(const GemmBf16& p, Stream stream) {
  const GemmCall call = call_of(p);
  if (!check_gemm("gemm_bf16", call, 8)) return;
  if (!p.b_is_transposed) return launch_bf16<false>(call, stream);
  check_size("gemm_bf16", "columns of a transposed b", p.columns, 0, 8);
  launch_bf16<true>(call, stream);
}

void gemm_fp8(const GemmFp8& p, Stream stream) {
  const GemmCall call = call_of(p);
  if (!check_gemm("gemm_fp8", call, 16)) return;
  const int width = choose_tile_n(call, {64, 128, 192});
  if (width == 64) return launch_gemm<Fp8Config<64>>(call, stream);
  if (width == 128) return launch_gemm<Fp8Config<128>>(call, stream);
  launch_gemm<Fp8Config<192>>(call, stream);
}

}  // namespace k25::cuda
