// C++ tests of the losses, of FP8 and of the experts' products on the CPU, for the sanitizers: every instruction set of
// this machine, threads, odd sizes. The values are checked by what must add up; k25sys' Python tests check them
// further.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "common/cpu_isa.h"
#include "fp8_gemm/api.h"
#include "grouped_gemm/api.h"
#include "linear_loss/api.h"
#include "policy_loss/api.h"
#include "swiglu/api.h"
#include "tests/expect.h"

namespace {

using namespace k25;
using namespace k25::tests;

struct Tokens {
  std::vector<int64_t> targets;
  std::vector<float> old, advantages, weights;

  Tokens(int64_t count, int64_t vocab)
      : targets(sized<int64_t>(count)),
        old(sized<float>(count, -3.0f)),
        advantages(normal_numbers(count, 3)),
        weights(sized<float>(count, 0.25f)) {
    for (int64_t t = 0; t < count; ++t) targets[size_t(t)] = t * 7 % vocab;
  }
  LossTokens all() const {
    return {old.data(), advantages.data(), weights.data(), Objective::clipped_log_ratio, -0.5, 0.5, 0.1, true};
  }
};

// The gradient of a token's logits sums to 0, as probabilities sum to 1.
template <class At>
void expect_zero_sums(int64_t num_tokens, int64_t vocab, const At& at, const char* what) {
  for (int64_t t = 0; t < num_tokens; ++t) {
    double sum = 0, size = 0;
    for (int64_t v = 0; v < vocab; ++v) {
      sum += at(t, v);
      size += std::abs(at(t, v));
    }
    expect(std::abs(sum) <= 1e-5 * size + 1e-12, what);
  }
}

void test_rows(int64_t num_tokens, int64_t vocab, int num_threads) {
  Tokens tokens(num_tokens, vocab);
  if (num_tokens > 2) tokens.weights[1] = 0;
  auto logits = normal_numbers(num_tokens * vocab, 5);
  auto logprobs = sized<float>(num_tokens), entropies = logprobs, losses = logprobs,
       grad = sized<float>(num_tokens * vocab);
  const auto run = [&](float* out) {
    cpu::loss_rows({tokens.all(), logits.data(), tokens.targets.data(), logprobs.data(), entropies.data(),
                    losses.data(), out, num_tokens, vocab, 0, DType::f32},
                   num_threads);
  };
  run(grad.data());
  expect_zero_sums(
      num_tokens, vocab, [&](int64_t t, int64_t v) { return double(grad[size_t(t * vocab + v)]); },
      "gradients of logits sum to 0");
  run(nullptr);
  run(logits.data());
  expect(logits == grad, "the same in place");
}

void test_linear(int64_t num_tokens, int64_t vocab, int64_t dim, int num_threads) {
  const Tokens tokens(num_tokens, vocab);
  const auto hidden = normal_numbers(num_tokens * dim, 6), head = normal_numbers(vocab * dim, 7);
  const auto hidden16 = to_bf16(hidden), head16 = to_bf16(head);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const bool narrow = dtype == DType::bf16;
    const void* h = narrow ? static_cast<const void*>(hidden16.data()) : hidden.data();
    const void* w = narrow ? static_cast<const void*>(head16.data()) : head.data();
    auto logits = sized<float>(vocab * num_tokens), stats = sized<float>(4 * num_tokens);
    cpu::linear_logits({h, w, tokens.targets.data(), logits.data(), stats.data(), num_tokens, vocab, 0, dim, dtype},
                       num_threads);
    auto log_sums = sized<float>(num_tokens);
    const auto slopes = sized<float>(num_tokens, -0.5f);
    for (int64_t t = 0; t < num_tokens; ++t) log_sums[t] = stats[4 * t] + std::log(stats[4 * t + 1]);
    auto hidden_grad16 = sized<uint16_t>(num_tokens * dim);
    auto hidden_grad = sized<float>(num_tokens * dim), head_grad = sized<float>(vocab * dim);
    auto high = sized<uint16_t>(vocab * dim), low = high;
    for (const bool first : {true, false}) {
      LinearGrads p{h,
                    w,
                    tokens.targets.data(),
                    log_sums.data(),
                    slopes.data(),
                    logits.data(),
                    narrow ? static_cast<void*>(hidden_grad16.data()) : hidden_grad.data(),
                    narrow ? static_cast<void*>(high.data()) : head_grad.data(),
                    narrow ? low.data() : nullptr,
                    first,
                    !first,
                    num_tokens,
                    vocab,
                    0,
                    dim,
                    dtype,
                    dtype};
      cpu::linear_grads(p, num_threads);
      if (narrow || !first) continue;
      expect_zero_sums(
          num_tokens, vocab, [&](int64_t t, int64_t v) { return double(logits[size_t(v * num_tokens + t)]); },
          "gradients of transposed logits sum to 0");
    }
  }
}

void test_fp8(int64_t m, int64_t n, int64_t k, int num_threads) {
  const auto a = normal_numbers(m * k, 8), b = normal_numbers(n * k, 9);
  struct Quantized {
    std::vector<uint8_t> values, turned;
    std::vector<float> scales, turned_scales, exact;
  };
  const auto quantize = [&](const std::vector<float>& x, int64_t rows, bool square) {
    Quantized q{sized<uint8_t>(rows * k), sized<uint8_t>(rows * k),
                sized<float>((square ? fp8_tiles(rows) : rows) * fp8_tiles(k)), sized<float>(k * fp8_tiles(rows)),
                sized<float>(rows * k)};
    cpu::quantize_fp8({x.data(), q.values.data(), q.scales.data(), q.turned.data(), q.turned_scales.data(), 1, rows, k,
                       square, false, DType::f32},
                      num_threads);
    cpu::dequantize_fp8({q.values.data(), q.scales.data(), q.exact.data(), 1, rows, k, square, DType::f32},
                        num_threads);
    return q;
  };
  const Quantized left = quantize(a, m, false), right = quantize(b, n, true);
  for (size_t i = 0; i < a.size(); ++i)
    expect(std::abs(a[i] - left.exact[i]) < 0.0625 * std::abs(a[i]) + 0.01, "rounding");
  const int32_t offsets[] = {0, int32_t(m / 3), int32_t(m)}, one[] = {0, int32_t(m)};
  auto out = sized<float>(m * n);
  cpu::fp8_gemm({left.values.data(), left.scales.data(), right.values.data(), right.scales.data(), one, out.data(), m,
                 n, k, 1, Fp8Grouping::rows, DType::f32},
                num_threads);
  for (int64_t i = 0; i < m * n; ++i) {
    double exact = 0;
    for (int64_t d = 0; d < k; ++d) exact += double(left.exact[i / n * k + d]) * right.exact[i % n * k + d];
    expect(std::abs(exact - out[i]) <= 1e-4 * std::sqrt(double(k) + 1), "product of dequantised numbers");
  }
  Quantized turned{sized<uint8_t>(n * k), {}, sized<float>(fp8_tiles(n) * fp8_tiles(k)), {}, {}};
  cpu::transpose_fp8({right.values.data(), right.scales.data(), turned.values.data(), turned.scales.data(), 1, n, k},
                     num_threads);
  auto through = sized<float>(m * n);
  cpu::fp8_gemm({left.values.data(), left.scales.data(), turned.values.data(), turned.scales.data(), one,
                 through.data(), m, n, k, 1, Fp8Grouping::rows_transposed, DType::f32},
                num_threads);
  expect(through == out, "transposed weights give the same");
  auto twice = right.values;
  twice.insert(twice.end(), right.values.begin(), right.values.end());
  auto scales = right.scales;
  scales.insert(scales.end(), right.scales.begin(), right.scales.end());
  auto grouped = sized<float>(m * n);
  cpu::fp8_gemm({left.values.data(), left.scales.data(), twice.data(), scales.data(), offsets, grouped.data(), m, n, k,
                 2, Fp8Grouping::rows, DType::f32},
                num_threads);
  expect(grouped == out, "two groups with the same weights");
  if (k > 0) {
    const int32_t whole[] = {0, 0, int32_t(k)};
    auto sums = sized<float>(2 * m * m);
    cpu::fp8_gemm({left.values.data(), left.scales.data(), left.values.data(), left.scales.data(), whole, sums.data(),
                   m, m, k, 2, Fp8Grouping::reduction, DType::f32},
                  num_threads);
    expect(std::all_of(sums.begin(), sums.begin() + m * m, [](float x) { return x == 0; }),
           "an empty group gives zeros");
  }
}

template <class Value>
void test_products(DType dtype, int64_t m, int64_t n, int64_t k, int num_threads) {
  const auto in = [](const std::vector<float>& values) {
    if constexpr (sizeof(Value) == 2) {
      return to_bf16(values);
    } else {
      return values;
    }
  };
  auto both = normal_numbers(2 * n * k, 4);
  std::copy(both.begin(), both.begin() + n * k, both.begin() + n * k);  // two experts with the same matrix
  const auto a = in(normal_numbers(m * k, 3)), b = in(both);
  auto b_t = sized<Value>(2 * n * k);
  for (int64_t i = 0; i < 2 * n * k; ++i) {
    const int64_t e = i / (n * k), row = i % (n * k) / k, column = i % k;
    b_t[size_t(e * n * k + column * n + row)] = b[size_t(i)];
  }
  const int32_t offsets[] = {0, int32_t(m / 3), int32_t(m)}, one[] = {0, int32_t(m)};
  auto plain = sized<Value>(m * n), grouped = plain, transposed = plain;
  cpu::grouped_gemm({a.data(), b.data(), one, plain.data(), m, n, k, 1, false, dtype}, num_threads);
  cpu::grouped_gemm({a.data(), b.data(), offsets, grouped.data(), m, n, k, 2, false, dtype}, num_threads);
  cpu::grouped_gemm({a.data(), b_t.data(), offsets, transposed.data(), m, n, k, 2, true, dtype}, num_threads);
  expect(grouped == plain && transposed == plain, "experts with the same matrix, transposed or not");
  const auto grads = [&](const int32_t* rows, int64_t experts, bool accumulate, std::vector<float>& out) {
    cpu::grouped_gemm_weight_grads(
        {plain.data(), a.data(), rows, out.data(), m, n, k, experts, accumulate, dtype, DType::f32}, num_threads);
  };
  auto parts = sized<float>(2 * n * k), whole = sized<float>(n * k);
  grads(offsets, 2, false, parts);
  grads(one, 1, false, whole);
  const auto once = whole;
  grads(one, 1, true, whole);
  for (size_t i = 0; i < once.size(); ++i) {
    expect(std::abs(parts[i] + parts[i + once.size()] - once[i]) <= 1e-3 * (std::abs(once[i]) + double(k + m)),
           "experts' gradients add up");
    expect(whole[i] == 2 * once[i], "added to itself");
  }
}

void test_weighted_swiglu(int64_t rows, int64_t width, int num_threads) {
  const auto gate_up = normal_numbers(rows * 2 * width, 1), grad = normal_numbers(rows * width, 2);
  const auto weights = sized<float>(rows, 2.0f);
  auto slots = sized<int32_t>(rows);
  for (int64_t m = 0; m < rows; ++m) slots[size_t(m)] = int32_t(rows - 1 - m);
  auto plain = sized<float>(rows * 2 * width), weighted = plain;
  auto act = sized<float>(rows * width), twice = act, grad_weights = sized<float>(rows);
  cpu::swiglu({gate_up.data(), act.data(), rows, width, DType::f32}, num_threads);
  cpu::swiglu_backward({grad.data(), gate_up.data(), plain.data(), rows, width, DType::f32}, num_threads);
  cpu::weighted_swiglu_backward({grad.data(), gate_up.data(), weights.data(), slots.data(), weighted.data(),
                                 twice.data(), grad_weights.data(), rows, width, DType::f32},
                                num_threads);
  for (size_t i = 0; i < plain.size(); ++i) expect(weighted[i] == 2 * plain[i], "the gradient times the weight");
  for (size_t i = 0; i < act.size(); ++i) expect(twice[i] == 2 * act[i], "the activation times the weight");
}

}  // namespace

int main() {
  std::vector<std::string> isas{"emulated_bf16"};
  for (const cpu::Isa isa : cpu::available_isas()) isas.emplace_back(cpu::name_of(isa));
  for (const std::string& isa : isas) {
    cpu::set_isa(isa);
    for (const int num_threads : {1, 3}) {
      test_rows(0, 5, num_threads);
      test_rows(5, 1, num_threads);
      test_rows(6, 131, num_threads);
      test_linear(1, 3, 2, num_threads);
      test_linear(13, 401, 37, num_threads);
      test_products<float>(DType::f32, 7, 33, 61, num_threads);
      test_products<uint16_t>(DType::bf16, 40, 5, 130, num_threads);
      test_products<uint16_t>(DType::bf16, 0, 5, 3, num_threads);
      test_weighted_swiglu(0, 4, num_threads);
      test_weighted_swiglu(9, 35, num_threads);
      test_fp8(5, 3, 0, num_threads);
      test_fp8(7, 33, 131, num_threads);
      test_fp8(130, 129, 40, num_threads);
    }
    std::printf("%s: %s\n", isa.c_str(), failures() ? "FAILED" : "ok");
  }
  return failures() ? EXIT_FAILURE : EXIT_SUCCESS;
}
