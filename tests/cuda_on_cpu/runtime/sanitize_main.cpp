// Every kernel once in each order, from source, for AddressSanitizer, UBSan and ThreadSanitizer. Buffers are exactly as
// long as the op says. Results are checked by test_kernels.py; here only the copy, the sum and the mean are, so that a
// bug which a sanitizer cannot see is not taken for a clean run.
#include <cstdio>
#include <numeric>
#include <vector>

#include "dispatch/api.h"
#include "executor.h"
#include "fp8_quantize/api.h"
#include "plan_dispatch/api.h"
#include "pool_temporal_patches/api.h"
#include "route_tokens/api.h"
#include "swiglu/api.h"

namespace {

using namespace k25;

struct Sizes {
  int64_t tokens, experts, dim, width;
  int top_k;
};

std::vector<float> waves(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (size_t i = 0; i < values.size(); ++i) values[i] = float(i * 7919 % 1009) / 500.0f - 1.0f;
  return values;
}

// Two clips, of two frames and of one, all of whose patches are equal along a row of the tensor.
bool run_pooling(int64_t dim) {
  const Clip clips[] = {{0, 0, 2, 4, 2}, {16, 2, 1, 2, 4}};
  const int64_t patches = 24, num_out = 4;
  const auto row = waves(dim);
  std::vector<float> x, out(num_out * 4 * dim), grad_x(patches * dim);
  for (int64_t p = 0; p < patches; ++p) x.insert(x.end(), row.begin(), row.end());
  cuda::pool_temporal_patches({x.data(), clips, out.data(), 2, patches, num_out, dim, 2, 2, DType::f32}, nullptr);
  cuda::pool_temporal_patches_backward({out.data(), clips, grad_x.data(), 2, patches, num_out, dim, 2, 2, DType::f32},
                                       nullptr);
  bool right = true;
  for (int64_t i = 0; i < num_out * 4 * dim; ++i) right &= out[i] == row[i % dim];
  for (int64_t i = 0; i < patches * dim; ++i) right &= grad_x[i] == row[i % dim] / (i < 16 * dim ? 2 : 1);
  return right;
}

// Transposed twice, tiles are what they were.
bool run_transpose(int64_t rows, int64_t cols) {
  std::vector<uint8_t> values(2 * rows * cols), turned(values.size()), again(values.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = uint8_t(i * 31);
  const auto scales = waves(2 * fp8_tiles(rows) * fp8_tiles(cols));
  auto turned_scales = scales, scales_again = scales;
  cuda::transpose_fp8({values.data(), scales.data(), turned.data(), turned_scales.data(), 2, rows, cols}, nullptr);
  cuda::transpose_fp8({turned.data(), turned_scales.data(), again.data(), scales_again.data(), 2, cols, rows}, nullptr);
  return again == values && scales_again == scales && turned[size_t(rows)] == values[1];
}

bool run(const Sizes& s) {
  const int64_t rows = s.tokens * s.top_k;
  const auto logits = waves(s.tokens * s.experts), bias = waves(s.experts), x = waves(s.tokens * s.dim);
  std::vector<float> weights(rows), grad_logits(logits.size()), x_rows(rows * s.dim), out(x.size());
  std::vector<float> grad_rows(x_rows.size()), grad_weights(rows), act(rows * s.width), grad_gate_up(2 * act.size());
  std::vector<int32_t> experts(rows), counts(s.experts), offsets(s.experts + 1), slot_of_row(rows), row_of_slot(rows);
  std::vector<int32_t> workspace(cuda::plan_dispatch_workspace(rows, s.experts));

  cuda::route_tokens(
      {logits.data(), bias.data(), weights.data(), experts.data(), DType::f32, s.tokens, s.experts, s.top_k, 2.0},
      nullptr);
  cuda::route_tokens_backward({weights.data(), logits.data(), experts.data(), grad_logits.data(), DType::f32, s.tokens,
                               s.experts, s.top_k, 2.0},
                              nullptr);
  cuda::plan_dispatch({experts.data(), false, s.tokens, s.experts, s.top_k, counts.data(), offsets.data(),
                       slot_of_row.data(), row_of_slot.data(), workspace.data()},
                      nullptr);
  cuda::dispatch({x.data(), slot_of_row.data(), x_rows.data(), s.tokens, rows, s.dim, s.top_k, DType::f32}, nullptr);
  cuda::combine({x_rows.data(), nullptr, row_of_slot.data(), out.data(), s.tokens, rows, s.dim, s.top_k, DType::f32},
                nullptr);
  cuda::combine_backward({x.data(), x_rows.data(), weights.data(), slot_of_row.data(), grad_rows.data(),
                          grad_weights.data(), s.tokens, rows, s.dim, s.top_k, DType::f32},
                         nullptr);
  const auto gate_up = waves(2 * rows * s.width);
  cuda::swiglu({gate_up.data(), act.data(), rows, s.width, DType::f32}, nullptr);
  cuda::swiglu_backward({act.data(), gate_up.data(), grad_gate_up.data(), rows, s.width, DType::f32}, nullptr);
  std::vector<float> weighted_grad(grad_gate_up.size()), weighted_act(act.size()), act_weights(rows);
  cuda::weighted_swiglu_backward({act.data(), gate_up.data(), weights.data(), slot_of_row.data(), weighted_grad.data(),
                                  weighted_act.data(), act_weights.data(), rows, s.width, DType::f32},
                                 nullptr);

  bool right = std::accumulate(counts.begin(), counts.end(), 0) == rows && offsets[s.experts] == rows;
  for (size_t i = 0; i < out.size(); ++i) right &= std::abs(out[i] - float(s.top_k) * x[i]) < 1e-4f;
  return right;
}

}  // namespace

int main() {
  const Sizes sizes[] = {{5, 8, 12, 8, 2}, {3, 33, 7, 5, 4}, {1, 300, 516, 4, 16}};
  for (const auto order : {cuda_on_cpu::Order::in_order, cuda_on_cpu::Order::reverse, cuda_on_cpu::Order::random}) {
    cuda_on_cpu::options() = {order, 1, false, false};
    for (const Sizes& s : sizes) {
      try {
        if (run(s) && run_pooling(s.dim) && run_transpose(4 * s.dim, 132) && run_transpose(s.width, 131)) continue;
        std::fprintf(stderr, "wrong result\n");
      } catch (const cuda_on_cpu::Error& error) {
        std::fprintf(stderr, "%s\n", error.what());
      }
      return 1;
    }
  }
  std::puts("all kernels ran");
  return 0;
}
