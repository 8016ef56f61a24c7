// C++ tests of the CPU kernels, for the sanitizers: every instruction set of this machine, threads, odd sizes, bad
// plans. The values are checked against double precision; k25sys' Python tests check them further.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "common/cpu_isa.h"
#include "common/threads.h"
#include "dispatch/api.h"
#include "expert_mlp/api.h"
#include "plan_dispatch/api.h"
#include "pool_temporal_patches/api.h"
#include "route_tokens/api.h"
#include "swiglu/api.h"
#include "tests/expect.h"

namespace {

using namespace k25;
using namespace k25::tests;

struct Layer {
  int64_t num_tokens, num_experts, dim, width;
  int top_k;
  std::vector<float> x, gate_up, down, weights, grad_out;
  std::vector<int32_t> experts, tokens_per_expert, offsets, slot_of_row, row_of_slot;

  Layer(int64_t t, int64_t e, int k, int64_t d, int64_t i) : num_tokens(t), num_experts(e), dim(d), width(i), top_k(k) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](int64_t count) {
      auto values = sized<float>(count);
      for (float& value : values) value = normal(random);
      return values;
    };
    x = fill(t * d);
    gate_up = fill(e * 2 * i * d);
    down = fill(e * d * i);
    weights = fill(t * k);
    grad_out = fill(t * d);
    experts = sized<int32_t>(t * k);
    for (int32_t& id : experts) id = int32_t(random() % uint64_t(e));
    tokens_per_expert = sized<int32_t>(e);
    offsets = sized<int32_t>(e + 1);
    slot_of_row = sized<int32_t>(t * k);
    row_of_slot = sized<int32_t>(t * k);
    cpu::plan_dispatch({experts.data(), false, t, e, k, tokens_per_expert.data(), offsets.data(), slot_of_row.data(),
                        row_of_slot.data(), nullptr},
                       1);
  }

  int64_t rows() const { return num_tokens * top_k; }
};

// y of one token in double precision.
std::vector<double> reference_token(const Layer& l, int64_t t) {
  auto y = sized<double>(l.dim);
  for (int k = 0; k < l.top_k; ++k) {
    const int64_t e = l.experts[t * l.top_k + k];
    auto act = sized<double>(l.width);
    for (int64_t i = 0; i < l.width; ++i) {
      double gate = 0, up = 0;
      for (int64_t d = 0; d < l.dim; ++d) {
        gate += double(l.x[t * l.dim + d]) * l.gate_up[(e * 2 * l.width + i) * l.dim + d];
        up += double(l.x[t * l.dim + d]) * l.gate_up[(e * 2 * l.width + l.width + i) * l.dim + d];
      }
      act[i] = gate / (1 + std::exp(-gate)) * up;
    }
    for (int64_t d = 0; d < l.dim; ++d) {
      double sum = 0;
      for (int64_t i = 0; i < l.width; ++i) sum += act[i] * l.down[(e * l.dim + d) * l.width + i];
      y[d] += l.weights[t * l.top_k + k] * sum;
    }
  }
  return y;
}

// Forward and backward with every output; Element is float or uint16_t (bf16).
template <class Element>
std::vector<Element> run_layer(const Layer& l, const std::vector<Element>& x, const std::vector<Element>& gate_up,
                               const std::vector<Element>& down, const std::vector<Element>& grad_out, DType dtype,
                               bool packed, int num_threads) {
  const int64_t m = l.rows();
  auto gate_up_rows = sized<Element>(m * 2 * l.width), act = sized<Element>(m * l.width);
  auto out_rows = sized<Element>(m * l.dim), out = sized<Element>(l.num_tokens * l.dim);
  std::vector<std::vector<char>> packs(4);
  for (int kind = 0; packed && kind < 4; ++kind) {
    const bool is_gate_up = kind == 0 || kind == 3;
    PackWeights p{is_gate_up ? gate_up.data() : down.data(),
                  nullptr,
                  l.num_experts,
                  is_gate_up ? 2 * l.width : l.dim,
                  is_gate_up ? l.dim : l.width,
                  PackKind(kind),
                  dtype};
    packs[size_t(kind)] = sized<char>(cpu::packed_bytes(p));
    p.packed = packs[size_t(kind)].data();
    cpu::pack_weights(p, num_threads);
  }
  const auto pack = [&](int kind) { return packed ? packs[size_t(kind)].data() : nullptr; };
  cpu::expert_mlp({x.data(),
                   gate_up.data(),
                   down.data(),
                   pack(0),
                   pack(1),
                   l.weights.data(),
                   l.offsets.data(),
                   l.slot_of_row.data(),
                   l.row_of_slot.data(),
                   gate_up_rows.data(),
                   act.data(),
                   out_rows.data(),
                   out.data(),
                   l.num_tokens,
                   l.num_experts,
                   l.dim,
                   l.width,
                   l.top_k,
                   dtype,
                   nullptr},
                  num_threads);
  auto grad_gate_up_rows = sized<Element>(m * 2 * l.width), grad_x_rows = sized<Element>(m * l.dim);
  auto grad_x = sized<Element>(l.num_tokens * l.dim);
  auto grad_gate_up = sized<Element>(int64_t(gate_up.size())), grad_down = sized<Element>(int64_t(down.size()));
  auto grad_weights = sized<float>(m);
  cpu::expert_mlp_backward({grad_out.data(),
                            x.data(),
                            gate_up.data(),
                            down.data(),
                            pack(3),
                            pack(2),
                            l.weights.data(),
                            l.offsets.data(),
                            l.slot_of_row.data(),
                            l.row_of_slot.data(),
                            gate_up_rows.data(),
                            grad_gate_up_rows.data(),
                            act.data(),
                            grad_x_rows.data(),
                            grad_x.data(),
                            grad_gate_up.data(),
                            grad_down.data(),
                            grad_weights.data(),
                            false,
                            dtype,
                            l.num_tokens,
                            l.num_experts,
                            l.dim,
                            l.width,
                            l.top_k,
                            dtype,
                            nullptr},
                           num_threads);
  std::vector<Element> all(out);
  for (const auto* part : {&grad_x, &grad_gate_up, &grad_down}) all.insert(all.end(), part->begin(), part->end());
  return all;
}

void test_layer(const Layer& l, int num_threads) {
  const auto result = run_layer(l, l.x, l.gate_up, l.down, l.grad_out, DType::f32, false, num_threads);
  for (int64_t t = 0; t < l.num_tokens; ++t) {
    const auto exact = reference_token(l, t);
    double error = 0, size = 1e-30;
    for (int64_t d = 0; d < l.dim; ++d) {
      error += std::pow(result[size_t(t * l.dim + d)] - exact[size_t(d)], 2);
      size += exact[size_t(d)] * exact[size_t(d)];
    }
    expect(error <= 1e-10 * size, "expert_mlp against double precision");
  }
  expect(result == run_layer(l, l.x, l.gate_up, l.down, l.grad_out, DType::f32, true, 1), "packed weights, one thread");
  const auto x = to_bf16(l.x), gate_up = to_bf16(l.gate_up), down = to_bf16(l.down), grad = to_bf16(l.grad_out);
  expect(run_layer(l, x, gate_up, down, grad, DType::bf16, false, num_threads) ==
             run_layer(l, x, gate_up, down, grad, DType::bf16, true, 1),
         "bf16 is bitwise independent of threads and of packing");
}

void test_small_ops(int num_threads) {
  const Layer l(19, 9, 3, 21, 5);
  auto logits = sized<float>(l.num_tokens * l.num_experts, 0.25f), bias = sized<float>(l.num_experts);
  auto weights = sized<float>(l.rows());
  auto experts = sized<int32_t>(l.rows());
  const RouteTokens route{logits.data(),  bias.data(), weights.data(),
                          experts.data(), DType::f32,  l.num_tokens,
                          l.num_experts,  l.top_k,     3.0};
  cpu::route_tokens(route, num_threads);
  for (int64_t i = 0; i < l.rows(); ++i) {
    expect(experts[size_t(i)] == i % l.top_k && std::abs(weights[size_t(i)] - 1) < 1e-6, "ties go to the lower id");
  }
  auto rows = sized<float>(l.rows() * l.dim), out = sized<float>(l.num_tokens * l.dim);
  cpu::dispatch({l.x.data(), l.slot_of_row.data(), rows.data(), l.num_tokens, l.rows(), l.dim, l.top_k, DType::f32},
                num_threads);
  cpu::combine(
      {rows.data(), nullptr, l.row_of_slot.data(), out.data(), l.num_tokens, l.rows(), l.dim, l.top_k, DType::f32},
      num_threads);
  for (size_t i = 0; i < out.size(); ++i) {
    expect(std::abs(out[i] - float(l.top_k) * l.x[i]) <= 1e-5 * std::abs(out[i]), "combine undoes dispatch");
  }
  auto grad_rows = sized<float>(l.rows() * l.dim), grad_weights = sized<float>(l.rows());
  cpu::combine_backward({l.grad_out.data(), rows.data(), l.weights.data(), l.slot_of_row.data(), grad_rows.data(),
                         grad_weights.data(), l.num_tokens, l.rows(), l.dim, l.top_k, DType::f32},
                        num_threads);
  auto act = sized<float>(l.num_tokens * 10), grad_gate_up = sized<float>(l.num_tokens * 20);
  cpu::swiglu({l.x.data(), act.data(), l.num_tokens, 10, DType::f32}, num_threads);
  cpu::swiglu_backward({act.data(), l.x.data(), grad_gate_up.data(), l.num_tokens, 10, DType::f32}, num_threads);
}

// Mixed clips, neighbourhoods and lengths of rows, against the formula in the order of the input.
void test_pooling(int64_t dim, int64_t merge_h, int64_t merge_w, int num_threads) {
  const std::vector<int64_t> grid{3, 2 * merge_h, merge_w, 1, merge_h, 3 * merge_w, 4, merge_h, 2 * merge_w};
  const int64_t cells = merge_h * merge_w, patches = (3 * 2 + 1 * 3 + 4 * 2) * cells;
  auto clips = sized<Clip>(3);
  const int64_t num_out = cpu::clip_table({grid.data(), true, 3, patches, merge_h, merge_w, clips.data()});
  expect(num_out == 7, "neighbourhoods of all clips");
  auto x = sized<float>(patches * dim), out = sized<float>(num_out * cells * dim), grad_x = sized<float>(patches * dim);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 251) - 125;
  auto wanted = sized<double>(int64_t(out.size()));
  std::vector<int64_t> out_row_of_patch, frames_of_patch;
  for (const Clip& clip : clips) {
    for (int64_t i = 0; i < clip.frames * clip.height * clip.width; ++i) {
      const int64_t row = i / clip.width % clip.height, column = i % clip.width;
      const int64_t out_patch = clip.first_out + row / merge_h * (clip.width / merge_w) + column / merge_w;
      out_row_of_patch.push_back(out_patch * cells + row % merge_h * merge_w + column % merge_w);
      frames_of_patch.push_back(clip.frames);
    }
  }
  const auto row_of = [&](int64_t i) { return size_t(out_row_of_patch[size_t(i / dim)] * dim + i % dim); };
  const auto frames_of = [&](int64_t i) { return double(frames_of_patch[size_t(i / dim)]); };
  for (int64_t i = 0; i < patches * dim; ++i) wanted[row_of(i)] += x[size_t(i)] / frames_of(i);
  cpu::pool_temporal_patches(
      {x.data(), clips.data(), out.data(), 3, patches, num_out, dim, merge_h, merge_w, DType::f32}, num_threads);
  cpu::pool_temporal_patches_backward(
      {out.data(), clips.data(), grad_x.data(), 3, patches, num_out, dim, merge_h, merge_w, DType::f32}, num_threads);
  for (size_t i = 0; i < out.size(); ++i) expect(std::abs(out[i] - wanted[i]) < 1e-4, "the mean over frames");
  for (int64_t i = 0; i < patches * dim; ++i) {
    expect(std::abs(grad_x[size_t(i)] - wanted[row_of(i)] / frames_of(i)) < 1e-4, "each frame's share of a gradient");
  }
  const auto x16 = to_bf16(x);
  auto out16 = sized<uint16_t>(int64_t(out.size())), grad16 = sized<uint16_t>(int64_t(x.size()));
  cpu::pool_temporal_patches(
      {x16.data(), clips.data(), out16.data(), 3, patches, num_out, dim, merge_h, merge_w, DType::bf16}, num_threads);
  cpu::pool_temporal_patches_backward(
      {out16.data(), clips.data(), grad16.data(), 3, patches, num_out, dim, merge_h, merge_w, DType::bf16},
      num_threads);
  expect(out16 == to_bf16(out), "bf16 is the float32 mean, rounded once");
}

void test_bad_input_is_refused() {
  Layer l(6, 4, 2, 8, 8);
  l.experts[5] = 4;
  expect_throws<std::out_of_range>(
      [&] {
        cpu::plan_dispatch({l.experts.data(), false, 6, 4, 2, l.tokens_per_expert.data(), l.offsets.data(),
                            l.slot_of_row.data(), l.row_of_slot.data(), nullptr},
                           1);
      },
      "an expert id beyond the last");
  auto rows = sized<float>(l.rows() * l.dim);
  l.slot_of_row[3] = -1;
  expect_throws<std::out_of_range>(
      [&] { cpu::dispatch({l.x.data(), l.slot_of_row.data(), rows.data(), 6, 12, 8, 2, DType::f32}, 2); },
      "a plan with a slot outside");
  const int32_t odd_height[] = {1, 3, 2};
  auto clip = sized<Clip>(1);
  expect_throws<std::invalid_argument>([&] { cpu::clip_table({odd_height, false, 1, 6, 2, 2, clip.data()}); },
                                       "a height that does not divide");
  expect_throws<std::invalid_argument>([] { cpu::set_isa("avx9000"); }, "an unknown instruction set");
}

void test_threads() {
  for (const int num_threads : {1, 2, 5}) {
    auto seen = sized<int>(1000);
    cpu::parallel_for(1000, num_threads, [&](int64_t i) { ++seen[size_t(i)]; });
    expect(seen == sized<int>(1000, 1), "every index once");
    expect_throws<std::runtime_error>(
        [&] {
          cpu::parallel_for(100, num_threads, [](int64_t i) {
            if (i == 50) throw std::runtime_error("x");
          });
        },
        "an exception comes back to the caller");
  }
}

}  // namespace

int main() {
  test_threads();
  test_bad_input_is_refused();
  std::vector<std::string> isas{"emulated_bf16"};
  for (const cpu::Isa isa : cpu::available_isas()) isas.emplace_back(cpu::name_of(isa));
  for (const std::string& isa : isas) {
    cpu::set_isa(isa);
    for (const int num_threads : {1, 3}) {
      test_layer(Layer(0, 3, 2, 8, 8), num_threads);
      test_layer(Layer(1, 1, 1, 1, 1), num_threads);
      test_layer(Layer(23, 5, 3, 37, 19), num_threads);
      test_layer(Layer(40, 3, 2, 1100, 33), num_threads);
      test_small_ops(num_threads);
      test_pooling(37, 2, 2, num_threads);
      test_pooling(128, 1, 3, num_threads);
      test_pooling(0, 2, 2, num_threads);
    }
    std::printf("%s: %s\n", isa.c_str(), failures() ? "FAILED" : "ok");
  }
  return failures() ? EXIT_FAILURE : EXIT_SUCCESS;
}
