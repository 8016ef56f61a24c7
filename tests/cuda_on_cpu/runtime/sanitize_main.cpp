// Every kernel once in each order, from source, for AddressSanitizer, UBSan and ThreadSanitizer. Buffers are exactly as
// long as the op says. Results are checked by test_kernels.py; here only the copy and the sum are, so that a bug which
// a sanitizer cannot see is not taken for a clean run.
#include <cstdio>
#include <numeric>
#include <vector>

#include "dispatch/api.h"
#include "executor.h"
#include "plan_dispatch/api.h"
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
        if (run(s)) continue;
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
