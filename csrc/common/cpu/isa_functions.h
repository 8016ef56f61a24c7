// The kernels as every compiled instruction set provides them; cpu_dispatch.cpp picks one set at run time.
#pragma once
#include "common/cpu_isa.h"
#include "dispatch/api.h"
#include "expert_mlp/api.h"
#include "fp8_gemm/api.h"
#include "grouped_gemm/api.h"
#include "linear_loss/api.h"
#include "policy_loss/api.h"
#include "pool_temporal_patches/api.h"
#include "route_tokens/api.h"
#include "swiglu/api.h"

#define K25_DECLARE_ISA(ISA)                                                    \
  namespace k25::cpu::ISA {                                                     \
  void route_tokens(const RouteTokens&, int);                                   \
  void route_tokens_backward(const RouteTokensBackward&, int);                  \
  void dispatch(const Dispatch&, int);                                          \
  void combine(const Combine&, int);                                            \
  void combine_backward(const CombineBackward&, int);                           \
  void swiglu(const Swiglu&, int);                                              \
  void swiglu_backward(const SwigluBackward&, int);                             \
  void pool_temporal_patches(const PoolTemporalPatches&, int);                  \
  void pool_temporal_patches_backward(const PoolTemporalPatchesBackward&, int); \
  void quantize_fp8(const QuantizeFp8&, int);                                   \
  void dequantize_fp8(const DequantizeFp8&, int);                               \
  void transpose_fp8(const TransposeFp8&, int);                                 \
  void grouped_gemm(const GroupedGemm&, int);                                   \
  void grouped_gemm_weight_grads(const GroupedGemmWeightGrads&, int);           \
  void weighted_swiglu_backward(const WeightedSwigluBackward&, int);            \
  void fp8_gemm(const Fp8Gemm&, int);                                           \
  void token_losses(const TokenLosses&, int);                                   \
  void logit_stats(const LogitStats&, int);                                     \
  void logit_grad(const LogitGrad&, int);                                       \
  void loss_rows(const LossRows&, int);                                         \
  void linear_logits(const LinearLogits&, int);                                 \
  void linear_grads(const LinearGrads&, int);                                   \
  void expert_mlp(const ExpertMlp&, int);                                       \
  void expert_mlp_backward(const ExpertMlpBackward&, int);                      \
  void pack_weights(const PackWeights&, int);                                   \
  int64_t packed_bytes(const PackWeights&);                                     \
  double peak_gflops(DType, double seconds);                                    \
  }

K25_DECLARE_ISA(portable)
#if defined(__x86_64__)
K25_DECLARE_ISA(avx2)
K25_DECLARE_ISA(avx512)
K25_DECLARE_ISA(avx512_bf16)
K25_DECLARE_ISA(emulated_bf16)
#endif
