#include "common/cpu/isa_functions.h"
#include "common/cpu/temporary.h"
#include "grouped_gemm/gemm.h"
#include "grouped_gemm/matrix_sink.h"
#include "policy_loss/rows.h"

namespace k25::cpu::K25_ISA {
namespace {

constexpr int64_t kRange = 32 * kTileRows;  // rows of the head in one task: with their logits they stay in the cache
constexpr int64_t kSharedColumns = 256;     // of grad_hidden, in one task of several threads

// Sums whose upper halves are a bf16 matrix and whose lower halves lie beside it: f32 sums in the memory of two bf16.
template <class Math>
struct SplitSink {
  using Vector = typename Math::Vector;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  Bf16* high;
  uint16_t* low;
  int64_t row_length, valid;
  bool first, last;

  K25_INLINE void put(int row, const Vector (&sums)[kTileVectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t at = row * row_length + v * lanes, count = at_most(lanes, valid - v * lanes);
      if (count <= 0) return;
      if (count == lanes) {  // of a size known here: no calls
        add(high + at, low + at, sums[v], sizeof(U16V));
      } else {
        add(high + at, low + at, sums[v], size_t(count) * 2);
      }
    }
  }
  K25_INLINE void add(Bf16* to, uint16_t* rest, F32V sum, size_t bytes) const {
    U16V upper{}, lower{};
    if (!first) {
      std::memcpy(&upper, to, bytes);
      std::memcpy(&lower, rest, bytes);
      sum += (F32V)(__builtin_convertvector(upper, U32V) << 16 | __builtin_convertvector(lower, U32V));
    }
    upper = last ? narrow(sum) : __builtin_convertvector((U32V)sum >> 16, U16V);
    lower = __builtin_convertvector((U32V)sum & 0xffffu, U16V);
    std::memcpy(static_cast<void*>(to), &upper, bytes);
    if (!last) std::memcpy(rest, &lower, bytes);
  }
};

template <class Math>
struct LinearLoss {
  using Element = typename Math::Element;
  using Unit = typename Math::Unit;
  using Vector = typename Math::Vector;
  using S = typename Tile<Math>::Scalar;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  static constexpr int64_t columns = Tile<Math>::kColumns;

  static int64_t num_ranges(int64_t vocab) { return (vocab + kRange - 1) / kRange; }

  // Panels of neighbouring columns: rows of `matrix` (num_columns, depth), or its columns (depth, num_columns).
  static void pack_rows_as_columns(Unit* to, const Element* matrix, int64_t num_columns, int64_t depth, int threads) {
    const int64_t per_panel = units_of<Math>(depth) * columns;
    parallel_for(Panels<Math>::count(num_columns), threads, [&](int64_t panel) {
      const PanelColumns at = Panels<Math>::columns(panel, num_columns);
      for (int v = 0; v < kTileVectors; ++v) {
        pack_transposed<Math>(to + panel * per_panel + v * lanes, matrix, depth, at.first[v], at.count[v], 0, depth);
      }
    });
  }
  static void pack_columns(Unit* to, const Element* matrix, int64_t num_columns, int64_t depth, int threads) {
    const int64_t per_panel = units_of<Math>(depth) * columns;
    parallel_for(Panels<Math>::count(num_columns), threads, [&](int64_t panel) {
      const PanelColumns at = Panels<Math>::columns(panel, num_columns);
      const Rows<Element> rows{matrix, num_columns};
      for (int v = 0; v < kTileVectors; ++v) {
        pack_rows<Math>(to + panel * per_panel + v * lanes, columns, rows, at.count[v] > 0 ? at.first[v] : 0,
                        at.count[v], 0, depth);
      }
    });
  }
  static int64_t packed_units(int64_t num_columns, int64_t depth) {
    return Panels<Math>::count(num_columns) * units_of<Math>(depth) * columns;
  }

  // --- logits ----------------------------------------------------------------------------------------------------
  // max, sum of exp(x - max) and sum of exp(x - max) (x - max) of each token over a range of the vocabulary: (3, T).
  static void range_stats(const S* logits, int64_t range, int64_t num_tokens, S* out) {
    for (int64_t t = 0; t < num_tokens; t += lanes) {
      const int64_t n = num_tokens - t;
      Vector max = splat(S(-__builtin_inff()));
      for (int64_t v = 0; v < range; ++v) {
        const Vector x = load_partial(logits + v * num_tokens + t, n);
        max = larger(x, max);
      }
      const Vector base = max < S(-1e30) ? Vector{} : max;
      Vector sum{}, weighted{};
      for (int64_t v = 0; v < range; ++v) {
        const Vector x = load_partial(logits + v * num_tokens + t, n);
        const Vector below = below_zero(x, base);
        const Vector e = exp_below_zero(below);
        sum += e;
        weighted += e * below;
      }
      store_partial(out + t, max, n);
      store_partial(out + num_tokens + t, sum, n);
      store_partial(out + 2 * num_tokens + t, weighted, n);
    }
  }

  static void join_stats(const LinearLogits& p, const S* parts) {
    const int64_t count = p.num_tokens;
    for (int64_t t = 0; t < count; ++t) {
      S max = -__builtin_inff(), sum = 0, weighted = 0;
      for (int64_t r = 0; r < num_ranges(p.vocab); ++r) {
        const S part = parts[3 * r * count + t];
        max = part > max ? part : max;
      }
      for (int64_t r = 0; r < num_ranges(p.vocab); ++r) {
        const S* part = parts + 3 * r * count + t;
        const S scale = part[0] > S(-1e30) ? exp_of(part[0] - max) : S(0);
        sum += part[count] * scale;
        weighted += scale == 0 ? 0 : (part[2 * count] + part[count] * (part[0] - max)) * scale;
      }
      const int64_t target = p.targets[t] - p.vocab_start;
      auto* out = static_cast<S*>(p.stats) + 4 * t;
      out[0] = max;
      out[1] = sum;
      out[2] = weighted;
      out[3] = target >= 0 && target < p.vocab ? static_cast<const S*>(p.logits_VT)[target * count + t]
                                               : S(-__builtin_inff());
    }
  }

  static void logits(const LinearLogits& p, int num_threads) {
    const Temporary<Unit> hidden(packed_units(p.num_tokens, p.dim));
    pack_rows_as_columns(hidden.get(), static_cast<const Element*>(p.hidden), p.num_tokens, p.dim, num_threads);
    const Temporary<S> parts(3 * num_ranges(p.vocab) * p.num_tokens);
    const Rows<Element> head{static_cast<const Element*>(p.head), p.dim};
    auto* out = static_cast<S*>(p.logits_VT);
    parallel_for(num_ranges(p.vocab), num_threads, [&](int64_t range) {
      const int64_t begin = range * kRange, end = at_most(begin + kRange, p.vocab);
      multiply_packed<Math>(head, begin, end, p.dim, p.num_tokens, hidden.get(),
                            [&](int64_t row, int64_t column, int64_t valid, bool accumulate) {
                              return matrix_sink<Math>(out, p.num_tokens, row, column, valid, accumulate, false);
                            });
      range_stats(out + begin * p.num_tokens, end - begin, p.num_tokens, parts.get() + 3 * range * p.num_tokens);
    });
    join_stats(p, parts.get());
  }

  // --- gradients -------------------------------------------------------------------------------------------------
  // slope (1[v = target] - exp(x - log_sum)) for a range of the vocabulary.
  static void range_grad(const LinearGrads& p, int64_t begin, int64_t end) {
    const int64_t count = p.num_tokens;
    const auto* log_sums = static_cast<const S*>(p.log_sums);
    const auto* slopes = static_cast<const S*>(p.slopes);
    auto* logits = static_cast<S*>(p.logits_VT);
    const auto grad_row = [&](int64_t v) { return reinterpret_cast<Element*>(logits + v * count); };
    S chance[kRange];  // of each target in the range, saved before its logit may be overwritten
    for (int64_t first = 0; first < count; first += kRange) {
      const int64_t last = at_most(first + kRange, count);
      for (int64_t t = first; t < last; ++t) {
        const int64_t v = p.targets[t] - p.vocab_start;
        if (v >= begin && v < end) chance[t - first] = exp_of(logits[v * count + t] - log_sums[t]);
      }
      for (int64_t v = begin; v < end; ++v) {
        for (int64_t t = first; t < last; t += lanes) {
          const int64_t n = last - t;
          const Vector below = below_zero(load_partial(logits + v * count + t, n), load_partial(log_sums + t, n));
          store_partial(grad_row(v) + t, exp_below_zero(below) * -load_partial(slopes + t, n), n);
        }
      }
      for (int64_t t = first; t < last; ++t) {
        const int64_t v = p.targets[t] - p.vocab_start;
        if (v >= begin && v < end) store_scalar(grad_row(v) + t, slopes[t] * (1 - chance[t - first]));
      }
    }
  }

  static Rows<Element> grad_rows(const LinearGrads& p) {
    constexpr int64_t elements = sizeof(S) / sizeof(Element);  // of the gradient in the place of one logit
    return {static_cast<const Element*>(p.logits_VT), p.num_tokens, nullptr, 1, elements * p.num_tokens};
  }

  template <class SinkAt>
  static void head_grad_of_range(const LinearGrads& p, int64_t begin, int64_t end, const Unit* hidden,
                                 const SinkAt& sink_at) {
    const Rows<Element> grad = grad_rows(p);
    multiply_packed<Math>(grad, begin, end, p.num_tokens, p.dim, hidden, sink_at);
  }

  static void head_grad(const LinearGrads& p, int64_t begin, int64_t end, const Unit* hidden) {
    if constexpr (sizeof(Element) == 2) {
      if (p.grad_head_low) {
        return head_grad_of_range(p, begin, end, hidden, [&](int64_t row, int64_t column, int64_t valid, bool) {
          const int64_t at = row * p.dim + column;
          return SplitSink<Math>{
              static_cast<Bf16*>(p.grad_head) + at, p.grad_head_low + at, p.dim, valid, p.first, p.last};
        });
      }
    }
    const auto run = [&](auto* matrix) {
      head_grad_of_range(p, begin, end, hidden, [&](int64_t row, int64_t column, int64_t valid, bool accumulate) {
        return matrix_sink<Math>(matrix, p.dim, row, column, valid, accumulate || !p.first);
      });
      stream_fence();
    };
    if (p.grad_head_dtype == p.dtype) return run(static_cast<Element*>(p.grad_head));
    run(static_cast<S*>(p.grad_head));
  }

  static void grads(const LinearGrads& p, int num_threads) {
    const Temporary<Unit> hidden(packed_units(p.dim, p.num_tokens));
    pack_columns(hidden.get(), static_cast<const Element*>(p.hidden), p.dim, p.num_tokens, num_threads);
    parallel_for(num_ranges(p.vocab), num_threads, [&](int64_t range) {
      const int64_t begin = range * kRange, end = at_most(begin + kRange, p.vocab);
      range_grad(p, begin, end);
      if (p.grad_head) head_grad(p, begin, end, hidden.get());
    });
    if (!p.grad_hidden) return;
    const Rows<Element> grad = grad_rows(p);
    const Rows<Element> head{static_cast<const Element*>(p.head), p.dim};
    const int64_t most = num_threads <= 1 ? at_least(p.dim, 1) : kSharedColumns;
    parallel_for((p.dim + most - 1) / most, num_threads, [&](int64_t i) {
      const WeightGradTask task{0, i * most, at_most((i + 1) * most, p.dim)};
      multiply_weight_grad<Math>(grad, head, 0, p.vocab, task, [&](int64_t row, int64_t column, int64_t valid) {
        return matrix_sink<Math>(static_cast<Element*>(p.grad_hidden), p.dim, row, column, valid, false);
      });
      stream_fence();
    });
  }
};

}  // namespace

void linear_logits(const LinearLogits& p, int num_threads) {
  if (p.dtype == DType::bf16) return LinearLoss<Bf16Math>::logits(p, num_threads);
  if (p.dtype == DType::f32) return LinearLoss<F32Math>::logits(p, num_threads);
  LinearLoss<F64Math>::logits(p, num_threads);
}

void linear_grads(const LinearGrads& p, int num_threads) {
  if (p.dtype == DType::bf16) return LinearLoss<Bf16Math>::grads(p, num_threads);
  if (p.dtype == DType::f32) return LinearLoss<F32Math>::grads(p, num_threads);
  LinearLoss<F64Math>::grads(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
