#include "common/cpu/isa_functions.h"
#include "common/cpu/simd.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

constexpr int kMaxTopK = 16;  // k25sys.ops refuses more
constexpr int64_t kLine = 64;
constexpr int64_t kStreamFrom = 8 << 20;  // bytes of output: more than the caches keep for the next op

void copy_past_caches(char* to, const char* from, int64_t bytes) {
  constexpr int64_t step = sizeof(F32V);
  for (int64_t i = 0; i < bytes; i += kLine) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kLine; j += step) stream(to + j, load<F32V>(from + j));
  }
}

template <class Element>
struct RowOps {
  using Scalar = typename Compute<Element>::Scalar;
  using Vector = typename Compute<Element>::Vector;
  static constexpr int lanes = sizeof(Vector) / sizeof(Scalar);

  // One token's columns [d, d + width): kAtOnce vectors of sums stay in registers while the token's rows pass by. The
  // same columns of the next token's rows are asked for meanwhile: rows are short and lie anywhere.
  template <int kAtOnce>
  static K25_INLINE void combine_columns(const Element* const* row_of, const Element* const* next_row_of,
                                         const Scalar* weights, int top_k, int64_t d, Element* out) {
    constexpr int64_t per_line = kLine / int64_t(sizeof(Element));
    Vector sums[kAtOnce] = {};
    for (int k = 0; k < top_k; ++k) {
      const Element* row = row_of[k] + d;
      for (int64_t i = 0; i < kAtOnce * lanes; i += per_line) __builtin_prefetch(next_row_of[k] + d + i);
#pragma GCC unroll 8
      for (int v = 0; v < kAtOnce; ++v) {
        const Vector value = load_compute(row + v * lanes);
        sums[v] += weights ? value * weights[k] : value;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kAtOnce; ++v) store_compute(out + d + v * lanes, sums[v]);
  }

  static void combine(const Combine& p, int num_threads) {
    constexpr int at_once = 8;
    const auto* rows = static_cast<const Element*>(p.rows);
    parallel_ranges(p.num_tokens, 8, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Element *row_of[kMaxTopK], *next_row_of[kMaxTopK];
        const int64_t next = t + 1 < end ? t + 1 : t;
        for (int k = 0; k < p.top_k; ++k) {
          row_of[k] = rows + p.row_of_slot[t * p.top_k + k] * p.dim;
          next_row_of[k] = rows + p.row_of_slot[next * p.top_k + k] * p.dim;
        }
        const Scalar* weights = p.weights ? static_cast<const Scalar*>(p.weights) + t * p.top_k : nullptr;
        auto* out = static_cast<Element*>(p.out) + t * p.dim;
        int64_t d = 0;
        for (; d + at_once * lanes <= p.dim; d += at_once * lanes) {
          combine_columns<at_once>(row_of, next_row_of, weights, p.top_k, d, out);
        }
        for (; d + lanes <= p.dim; d += lanes) combine_columns<1>(row_of, next_row_of, weights, p.top_k, d, out);
        for (; d < p.dim; ++d) {
          Scalar sum = 0;
          for (int k = 0; k < p.top_k; ++k) sum += load_scalar(row_of[k] + d) * (weights ? weights[k] : Scalar(1));
          store_scalar(out + d, sum);
        }
      }
    });
  }

  static void combine_backward(const CombineBackward& p, int num_threads) {
    parallel_ranges(p.num_rows, 32, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const int32_t slot = p.slot_of_row[m];
        const auto* grad = static_cast<const Element*>(p.grad_out) + slot / p.top_k * p.dim;
        const auto* row = static_cast<const Element*>(p.rows) + m * p.dim;
        const Scalar weight = static_cast<const Scalar*>(p.weights)[slot];
        Vector sum{};
        for (int64_t d = 0; d < p.dim; d += lanes) {
          const Vector g = load_partial(grad + d, p.dim - d);
          sum += g * load_partial(row + d, p.dim - d);
          store_partial(static_cast<Element*>(p.grad_rows) + m * p.dim + d, g * weight, p.dim - d);
        }
        static_cast<Scalar*>(p.grad_weights)[slot] = sum_lanes(sum);
      }
    });
  }
};

}  // namespace

void dispatch(const Dispatch& p, int num_threads) {
  const int64_t bytes = p.dim * size_of(p.dtype);
  auto* rows = static_cast<char*>(p.rows);
  const bool whole_lines = bytes % kLine == 0 && reinterpret_cast<uintptr_t>(rows) % kLine == 0;
  // One core waits for each line that it fetches to overwrite; two saturate the memory either way (measured).
  const bool past_caches = num_threads == 1 && whole_lines && p.num_rows * bytes >= kStreamFrom;
  parallel_ranges(p.num_rows, 64, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const char* token = static_cast<const char*>(p.x) + p.slot_of_row[m] / p.top_k * bytes;
      if (past_caches) {
        copy_past_caches(rows + m * bytes, token, bytes);
      } else {
        std::memcpy(rows + m * bytes, token, size_t(bytes));
      }
    }
    if (past_caches) stream_fence();
  });
}

void combine(const Combine& p, int num_threads) {
  if (p.dtype == DType::bf16) return RowOps<Bf16>::combine(p, num_threads);
  if (p.dtype == DType::f32) return RowOps<float>::combine(p, num_threads);
  RowOps<double>::combine(p, num_threads);
}

void combine_backward(const CombineBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return RowOps<Bf16>::combine_backward(p, num_threads);
  if (p.dtype == DType::f32) return RowOps<float>::combine_backward(p, num_threads);
  RowOps<double>::combine_backward(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
