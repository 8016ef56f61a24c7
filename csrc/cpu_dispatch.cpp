// The ops as callers see them: what must hold of the data is checked here, then the current instruction set's kernel
// runs.
#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/cpu/isa_functions.h"
#include "common/machine.h"
#include "common/threads.h"
#include "plan_dispatch/api.h"
#include "pool_temporal_patches/api.h"

#if defined(__x86_64__)
#define K25_RUN(function, ...)                     \
  switch (current_isa()) {                         \
    case Isa::avx2:                                \
      return avx2::function(__VA_ARGS__);          \
    case Isa::avx512:                              \
      return avx512::function(__VA_ARGS__);        \
    case Isa::avx512_bf16:                         \
      return avx512_bf16::function(__VA_ARGS__);   \
    case Isa::emulated_bf16:                       \
      return emulated_bf16::function(__VA_ARGS__); \
    default:                                       \
      return portable::function(__VA_ARGS__);      \
  }
#else
#define K25_RUN(function, ...) return portable::function(__VA_ARGS__)
#endif

namespace k25::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "emulated_bf16"};

bool runs_here(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::avx2 || isa == Isa::emulated_bf16) return avx2;
  if (isa == Isa::avx512) return avx512;
  return avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Isa parse_isa(const std::string& name) {
  if (name == "auto") return available_isas().back();
  for (int i = 0; i < 5; ++i) {
    if (name == kNames[i] && runs_here(Isa(i))) return Isa(i);
  }
  std::string message = "K25_CPU_ISA: asked for '" + name + "'; this machine accepts auto";
  for (const Isa isa : available_isas()) message += std::string(", ") + name_of(isa);
  throw std::invalid_argument(message);
}

std::atomic<int>& chosen_isa() {
  static std::atomic<int> chosen{[] {
    const char* wanted = std::getenv("K25_CPU_ISA");
    return int(parse_isa(wanted && *wanted ? wanted : "auto"));
  }()};
  return chosen;
}

[[noreturn]] void bad_plan(const char* op, const char* table, int64_t index, int64_t got, int64_t limit) {
  throw std::out_of_range(std::string(op) + ": plan." + table + "[" + std::to_string(index) + "]: got " +
                          std::to_string(got) + ", accepted 0 <= value < " + std::to_string(limit) +
                          "; use the plan that plan_dispatch returned for these tokens");
}

void check_table(const char* op, const char* table, const int32_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) bad_plan(op, table, i, values[i], limit);
  }
}

// A permutation and its inverse, and offsets that rise from 0 to M: then no row is written twice or left out.
template <class P>
void check_plan(const char* op, const P& p) {
  const int64_t num_rows = p.num_tokens * p.top_k;
  check_table(op, "slot_of_row", p.slot_of_row, num_rows, num_rows);
  check_table(op, "row_of_slot", p.row_of_slot, num_rows, num_rows);
  for (int64_t m = 0; m < num_rows; ++m) {
    if (p.row_of_slot[p.slot_of_row[m]] != m)
      bad_plan(op, "row_of_slot", p.slot_of_row[m], p.row_of_slot[p.slot_of_row[m]], num_rows);
  }
  for (int64_t e = 0; e <= p.num_experts; ++e) {
    const int64_t least = e == 0 ? 0 : p.offsets[e - 1];
    const bool last_is_wrong = e == p.num_experts && p.offsets[e] != num_rows;
    if (p.offsets[e] < least || (e == 0 && p.offsets[0] != 0) || p.offsets[e] > num_rows || last_is_wrong) {
      bad_plan(op, "offsets", e, p.offsets[e], num_rows + 1);
    }
  }
}

void check_offsets(const char* op, const int32_t* offsets, int64_t num_experts, int64_t num_rows) {
  for (int64_t e = 0; e <= num_experts; ++e) {
    const int64_t least = e == 0 ? 0 : offsets[e - 1], most = e == 0 ? 0 : num_rows;
    if (offsets[e] >= least && offsets[e] <= most && (e < num_experts || offsets[e] == num_rows)) continue;
    throw std::out_of_range(std::string(op) + ": offsets[" + std::to_string(e) + "]: got " +
                            std::to_string(offsets[e]) + ", accepted numbers that rise from 0 to " +
                            std::to_string(num_rows));
  }
}

[[noreturn]] void bad_grid(const std::string& where, const std::string& got, const std::string& accepted) {
  throw std::invalid_argument("pool_temporal_patches: grid_thw_N3" + where + ": got " + got + ", accepted " + accepted);
}

// Raises unless the neighbourhoods tile the clip. `sizes` is t, h, w.
void check_clip(int64_t clip, const int64_t (&sizes)[3], const ClipTable& p) {
  const int64_t multiple_of[] = {1, p.merge_h, p.merge_w};
  const char* const names[] = {"t", "h", "w"};
  for (int axis = 0; axis < 3; ++axis) {
    if (sizes[axis] > 0 && sizes[axis] % multiple_of[axis] == 0) continue;
    const std::string where = "[" + std::to_string(clip) + ", " + std::to_string(axis) + "] (" + names[axis] + ")";
    const std::string merge =
        "a positive multiple of " + std::to_string(multiple_of[axis]) + " (merge[" + std::to_string(axis - 1) + "])";
    bad_grid(where, std::to_string(sizes[axis]), axis == 0 ? "1 or more" : merge);
  }
}

template <class Size>
int64_t fill_clip_table(const ClipTable& p) {
  const auto* grid = static_cast<const Size*>(p.grid);
  int64_t first_patch = 0, first_out = 0;
  for (int64_t n = 0; n < p.num_clips; ++n) {
    const int64_t sizes[] = {grid[3 * n], grid[3 * n + 1], grid[3 * n + 2]};
    check_clip(n, sizes, p);
    int64_t area, patches;
    const bool overflow =
        __builtin_mul_overflow(sizes[1], sizes[2], &area) || __builtin_mul_overflow(area, sizes[0], &patches);
    if (overflow || patches > p.num_patches - first_patch) {
      bad_grid("[" + std::to_string(n) + "]",
               std::to_string(sizes[0]) + " x " + std::to_string(sizes[1]) + " x " + std::to_string(sizes[2]) +
                   " patches after " + std::to_string(first_patch),
               "at most " + std::to_string(p.num_patches - first_patch) + " more: x_PD has " +
                   std::to_string(p.num_patches) + " rows");
    }
    p.clips[n] = {first_patch, first_out, sizes[0], sizes[1], sizes[2]};
    first_patch += patches;
    first_out += area / (p.merge_h * p.merge_w);
  }
  if (first_patch != p.num_patches) {
    bad_grid("", "clips of " + std::to_string(first_patch) + " patches in all",
             std::to_string(p.num_patches) + ", the rows of x_PD");
  }
  return first_out;
}

void check_number(bool is_nan, const char* argument, int64_t row, int64_t column) {
  if (!is_nan) return;
  const std::string where = row < 0 ? std::to_string(column) : std::to_string(row) + ", " + std::to_string(column);
  throw std::invalid_argument(std::string("route_tokens: ") + argument + "[" + where +
                              "]: got NaN, accepted any number; look for the layer that overflowed");
}

template <class Id>
void count_and_place(const PlanDispatch& p) {
  const auto* experts = static_cast<const Id*>(p.experts);
  const int64_t num_slots = p.num_tokens * p.top_k;
  std::memset(p.tokens_per_expert, 0, size_t(p.num_experts) * 4);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    const Id id = experts[slot];
    if (id < 0 || int64_t(id) >= p.num_experts) {
      throw std::out_of_range("plan_dispatch: experts_TK[" + std::to_string(slot / p.top_k) + ", " +
                              std::to_string(slot % p.top_k) + "]: got " + std::to_string(id) +
                              ", accepted 0 <= id < " + std::to_string(p.num_experts) + " (num_experts)");
    }
    ++p.tokens_per_expert[id];
  }
  p.offsets[0] = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) p.offsets[e + 1] = p.offsets[e] + p.tokens_per_expert[e];
  for (int64_t slot = 0; slot < num_slots; ++slot) {  // offsets[e] runs ahead, and is put back below
    const int32_t row = p.offsets[experts[slot]]++;
    p.slot_of_row[row] = int32_t(slot);
    p.row_of_slot[slot] = row;
  }
  for (int64_t e = 0; e < p.num_experts; ++e) p.offsets[e] -= p.tokens_per_expert[e];
}

double scalar_at(const void* values, int64_t index, DType dtype) {
  if (dtype == DType::f64) return static_cast<const double*>(values)[index];
  return double(static_cast<const float*>(values)[index]);
}

void check_finite(const char* op, const char* argument, double value, int64_t token) {
  if (std::isfinite(value)) return;
  throw std::invalid_argument(std::string(op) + ": " + argument + "[" + std::to_string(token) + "]: got " +
                              std::to_string(value) +
                              ", accepted a finite number for a token with loss; mask it out, "
                              "or look for what overflowed");
}

// What a token with loss brings along, and its log-probability.
void check_loss_tokens(const char* op, const LossTokens& p, const void* logprobs, int64_t num_tokens, DType dtype) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (scalar_at(p.weights, t, dtype) == 0) continue;
    check_finite(op, "logprobs_T", scalar_at(logprobs, t, dtype), t);
    if (p.objective == Objective::cross_entropy) continue;
    check_finite(op, "old_logprobs_T", scalar_at(p.old_logprobs, t, dtype), t);
    check_finite(op, "advantages_T", scalar_at(p.advantages, t, dtype), t);
  }
}

void check_targets(const char* op, const LossRows& p, DType dtype) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const int64_t target = p.targets[t] - p.vocab_start;
    if (scalar_at(p.tokens.weights, t, dtype) == 0 || (target >= 0 && target < p.vocab)) continue;
    throw std::out_of_range(std::string(op) + ": targets_T[" + std::to_string(t) + "]: got " +
                            std::to_string(p.targets[t]) + ", accepted " + std::to_string(p.vocab_start) +
                            " <= target < " + std::to_string(p.vocab_start + p.vocab));
  }
}

void run_loss_rows(const LossRows& p, int num_threads) { K25_RUN(loss_rows, p, num_threads); }

}  // namespace

const char* name_of(Isa isa) { return kNames[int(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (int i = 0; i < 4; ++i) {
    if (runs_here(Isa(i))) isas.push_back(Isa(i));
  }
  return isas;
}

Isa current_isa() { return Isa(chosen_isa().load(std::memory_order_relaxed)); }
void set_isa(const std::string& name) { chosen_isa().store(int(parse_isa(name))); }

void advise_huge_pages(void* address, int64_t bytes) {
  constexpr uintptr_t page = 4096, huge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + uintptr_t(bytes)) / page * page;
  if (bytes >= int64_t(2 * huge)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

namespace {
double run_peak(DType dtype, double seconds) { K25_RUN(peak_gflops, dtype, seconds); }
}  // namespace
double peak_gflops(int dtype, double seconds) { return run_peak(DType(dtype), seconds); }

void route_tokens(const RouteTokens& p, int num_threads) {
  const auto is_nan = [&](int64_t i) {
    if (p.dtype == DType::f64) return std::isnan(static_cast<const double*>(p.logits)[i]);
    if (p.dtype == DType::f32) return std::isnan(static_cast<const float*>(p.logits)[i]);
    return (static_cast<const uint16_t*>(p.logits)[i] & 0x7fff) > 0x7f80;
  };
  for (int64_t e = 0; e < p.num_experts; ++e) check_number(std::isnan(p.bias[e]), "bias_E", -1, e);
  for (int64_t i = 0; i < p.num_tokens * p.num_experts; ++i) {
    if (is_nan(i)) check_number(true, "logits_TE", i / p.num_experts, i % p.num_experts);
  }
  K25_RUN(route_tokens, p, num_threads);
}

void route_tokens_backward(const RouteTokensBackward& p, int num_threads) {
  check_table("route_tokens_backward", "experts", p.experts, p.num_tokens * p.top_k, p.num_experts);
  K25_RUN(route_tokens_backward, p, num_threads);
}

void plan_dispatch(const PlanDispatch& p, int) {
  if (p.experts_are_int64) return count_and_place<int64_t>(p);
  count_and_place<int32_t>(p);
}

void dispatch(const Dispatch& p, int num_threads) {
  check_table("dispatch", "slot_of_row", p.slot_of_row, p.num_rows, p.num_tokens * p.top_k);
  K25_RUN(dispatch, p, num_threads);
}

void combine(const Combine& p, int num_threads) {
  check_table("combine", "row_of_slot", p.row_of_slot, p.num_tokens * p.top_k, p.num_rows);
  K25_RUN(combine, p, num_threads);
}

void combine_backward(const CombineBackward& p, int num_threads) {
  check_table("combine_backward", "slot_of_row", p.slot_of_row, p.num_rows, p.num_tokens * p.top_k);
  K25_RUN(combine_backward, p, num_threads);
}

void swiglu(const Swiglu& p, int num_threads) { K25_RUN(swiglu, p, num_threads); }
void swiglu_backward(const SwigluBackward& p, int num_threads) { K25_RUN(swiglu_backward, p, num_threads); }
void weighted_swiglu_backward(const WeightedSwigluBackward& p, int num_threads) {
  check_table("weighted_swiglu_backward", "slot_of_row", p.slot_of_row, p.num_rows, p.num_rows);
  K25_RUN(weighted_swiglu_backward, p, num_threads);
}

void quantize_fp8(const QuantizeFp8& p, int num_threads) { K25_RUN(quantize_fp8, p, num_threads); }
void dequantize_fp8(const DequantizeFp8& p, int num_threads) { K25_RUN(dequantize_fp8, p, num_threads); }

void transpose_fp8(const TransposeFp8& p, int num_threads) { K25_RUN(transpose_fp8, p, num_threads); }

void grouped_gemm(const GroupedGemm& p, int num_threads) {
  check_offsets("grouped_gemm", p.offsets, p.num_experts, p.rows);
  K25_RUN(grouped_gemm, p, num_threads);
}

void grouped_gemm_weight_grads(const GroupedGemmWeightGrads& p, int num_threads) {
  check_offsets("grouped_gemm_wgrad", p.offsets, p.num_experts, p.rows);
  K25_RUN(grouped_gemm_weight_grads, p, num_threads);
}

void fp8_gemm(const Fp8Gemm& p, int num_threads) {
  const bool reduces = p.grouping == Fp8Grouping::reduction;
  const int64_t end = reduces ? p.k : p.m;
  for (int64_t g = 0; g <= p.num_groups; ++g) {
    const int64_t offset = p.offsets[g], least = g == 0 ? 0 : p.offsets[g - 1];
    const bool aligned = !reduces || g == p.num_groups || offset % kFp8Tile == 0;
    const bool fits = g == 0 ? offset == 0 : g == p.num_groups ? offset == end : offset <= end;
    if (offset >= least && fits && aligned) continue;
    throw std::out_of_range("fp8_gemm: offsets[" + std::to_string(g) + "]: got " + std::to_string(offset) +
                            ", accepted numbers that rise from 0 to " + std::to_string(end) +
                            (reduces ? ", multiples of 128 but for the last" : ""));
  }
  K25_RUN(fp8_gemm, p, num_threads);
}

void token_losses(const TokenLosses& p, int num_threads) {
  check_loss_tokens("token_losses", p.tokens, p.logprobs, p.num_tokens, p.dtype);
  K25_RUN(token_losses, p, num_threads);
}
void logit_stats(const LogitStats& p, int num_threads) { K25_RUN(logit_stats, p, num_threads); }
void logit_grad(const LogitGrad& p, int num_threads) { K25_RUN(logit_grad, p, num_threads); }

void loss_rows(const LossRows& p, int num_threads) {
  const DType scalar = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_targets("loss_rows", p, scalar);
  run_loss_rows(p, num_threads);
  check_loss_tokens("loss_rows", p.tokens, p.logprobs, p.num_tokens, scalar);
}

void linear_logits(const LinearLogits& p, int num_threads) { K25_RUN(linear_logits, p, num_threads); }
void linear_grads(const LinearGrads& p, int num_threads) {
  if (p.num_tokens > kMostTokensOfHeadGrad) throw std::invalid_argument("linear_grads: too many tokens in a chunk");
  K25_RUN(linear_grads, p, num_threads);
}

int64_t clip_table(const ClipTable& p) {
  return p.grid_is_int64 ? fill_clip_table<int64_t>(p) : fill_clip_table<int32_t>(p);
}
void pool_temporal_patches(const PoolTemporalPatches& p, int num_threads) {
  K25_RUN(pool_temporal_patches, p, num_threads);
}
void pool_temporal_patches_backward(const PoolTemporalPatchesBackward& p, int num_threads) {
  K25_RUN(pool_temporal_patches_backward, p, num_threads);
}

void expert_mlp(const ExpertMlp& p, int num_threads) {
  check_plan("expert_mlp", p);
  K25_RUN(expert_mlp, p, num_threads);
}

void expert_mlp_backward(const ExpertMlpBackward& p, int num_threads) {
  check_plan("expert_mlp_backward", p);
  K25_RUN(expert_mlp_backward, p, num_threads);
}

int64_t packed_bytes(const PackWeights& p) { K25_RUN(packed_bytes, p); }
void pack_weights(const PackWeights& p, int num_threads) { K25_RUN(pack_weights, p, num_threads); }

}  // namespace k25::cpu
