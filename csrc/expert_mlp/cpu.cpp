// The fused experts for one instruction set. Forward: gate/up GEMM with the gather and SwiGLU fused, down GEMM with the
// routing weight fused, combine. Backward: the gradient of the activation with SwiGLU's derivative fused, then input
// and weight gradients, then the combine of the input's. Each output element is computed by one task in a fixed order,
// so results are bitwise the same for every number of threads.
#include <ctime>
#include <type_traits>

#include "common/cpu/isa_functions.h"
#include "grouped_gemm/matrices.h"

namespace k25::cpu::K25_ISA {
namespace {

class PhaseClock {
 public:
  explicit PhaseClock(double* seconds) : seconds_(seconds), last_(seconds ? now() : 0) {}
  void lap(int phase) {
    if (!seconds_) return;
    const double time = now();
    seconds_[phase] += time - last_;
    last_ = time;
  }

 private:
  static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
  }
  double* seconds_;
  double last_;
};

template <class Math>
struct Experts {
  using Element = typename Math::Element;
  using Unit = typename Math::Unit;
  using Vector = typename Math::Vector;
  using Scalar = typename Tile<Math>::Scalar;
  static constexpr int lanes = Tile<Math>::kVectorLanes;
  static constexpr int64_t columns = Tile<Math>::kColumns;
  static constexpr int64_t kElementsPerLine = 64 / int64_t(sizeof(Element));

  static int64_t gate_up_panel_units(int64_t dim, int64_t width) {
    return Panels<Math>::pair_count(width) * units_of<Math>(dim) * columns;
  }
  static int64_t panel_units(int64_t depth, int64_t num_columns) {
    return Panels<Math>::count(num_columns) * units_of<Math>(depth) * columns;
  }

  // --- packing ---------------------------------------------------------------------------------------------------
  static int64_t units_per_expert(const PackWeights& p) {
    switch (p.kind) {
      case PackKind::gate_up_forward:
        return gate_up_panel_units(p.cols, p.rows / 2);
      case PackKind::down_forward:
        return panel_units(p.cols, p.rows);
      default:
        return panel_units(p.rows, p.cols);
    }
  }
  static void pack(const PackWeights& p, int num_threads) {
    const int64_t per_expert = units_per_expert(p);
    const bool forward = p.kind == PackKind::gate_up_forward || p.kind == PackKind::down_forward;
    const int64_t per_panel = units_of<Math>(forward ? p.cols : p.rows) * columns;
    const int64_t panels = per_panel ? per_expert / per_panel : 0;
    parallel_for(p.num_experts * panels, num_threads, [&](int64_t i) {
      const int64_t expert = i / panels, panel = i % panels;
      const auto* matrix = static_cast<const Element*>(p.weights) + expert * p.rows * p.cols;
      auto* to = static_cast<Unit*>(p.packed) + expert * per_expert + panel * per_panel;
      if (p.kind == PackKind::gate_up_forward) {
        PackRows<Math>{matrix, p.cols, p.rows / 2, true}(to, panel, 0, p.cols);
      } else if (forward) {
        PackRows<Math>{matrix, p.cols, p.rows, false}(to, panel, 0, p.cols);
      } else {
        PackColumns<Math>{matrix, p.cols}(to, panel, 0, p.rows);
      }
    });
  }

  static Scalar weight_of(const void* weights, const int32_t* slots, int64_t row) {
    return static_cast<const Scalar*>(weights)[slots[row]];
  }

  // --- forward ---------------------------------------------------------------------------------------------------
  static void gate_up_tile(const ExpertMlp& p, int64_t row, int count, int64_t panel, const Scalar* c) {
    const PanelColumns at = Panels<Math>::pair_columns(panel, p.width);
    auto* saved = static_cast<Element*>(p.gate_up_rows);
    auto* act = static_cast<Element*>(p.act_rows);
    for (int r = 0; r < count; ++r, c += columns) {
      for (int v = 0; v < kTileVectors / 2; ++v) {
        const Element* kind = nullptr;
        const Vector gate = round_to(load<Vector>(c + v * lanes), kind);
        const Vector up = round_to(load<Vector>(c + columns / 2 + v * lanes), kind);
        if (at.count[v] == 0) continue;
        if (saved) {
          store_partial(saved + (row + r) * 2 * p.width + at.first[v], gate, at.count[v]);
          store_partial(saved + (row + r) * 2 * p.width + p.width + at.first[v], up, at.count[v]);
        }
        store_partial(act + (row + r) * p.width + at.first[v], gate * sigmoid(gate) * up, at.count[v]);
      }
    }
  }

  static void forward(const ExpertMlp& p, int num_threads) {
    PhaseClock clock(p.phase_seconds);
    const Rows<Element> x{static_cast<const Element*>(p.x), p.dim, p.slot_of_row, p.top_k};
    for_each_panel_task(
        p.offsets, p.num_experts, Panels<Math>::pair_count(p.width), num_threads, [&](const PanelTask& t) {
          const auto* matrix = static_cast<const Element*>(p.gate_up) + t.expert * 2 * p.width * p.dim;
          const auto* kept = static_cast<const Unit*>(p.packed_gate_up);
          if (kept) kept += t.expert * gate_up_panel_units(p.dim, p.width);
          multiply_expert_rows<Math>(
              x, p.offsets[t.expert], p.offsets[t.expert + 1], p.dim, t, kept,
              PackRows<Math>{matrix, p.dim, p.width, true},
              [&](int64_t row, int count, int64_t panel, const Scalar* c) { gate_up_tile(p, row, count, panel, c); });
        });
    clock.lap(0);
    const Rows<Element> act{static_cast<const Element*>(p.act_rows), p.width};
    for_each_panel_task(p.offsets, p.num_experts, Panels<Math>::count(p.dim), num_threads, [&](const PanelTask& t) {
      const auto* matrix = static_cast<const Element*>(p.down) + t.expert * p.dim * p.width;
      const auto* kept = static_cast<const Unit*>(p.packed_down);
      if (kept) kept += t.expert * panel_units(p.width, p.dim);
      multiply_expert_rows<Math>(act, p.offsets[t.expert], p.offsets[t.expert + 1], p.width, t, kept,
                                 PackRows<Math>{matrix, p.width, p.dim, false},
                                 [&](int64_t row, int count, int64_t panel, const Scalar* c) {
                                   store_tile<Math>(static_cast<Element*>(p.out_rows), p.dim, row, count, panel, c,
                                                    [&](int64_t m) { return weight_of(p.weights, p.slot_of_row, m); });
                                 });
    });
    clock.lap(1);
    combine({p.out_rows, nullptr, p.row_of_slot, p.out, p.num_tokens, p.num_tokens * p.top_k, p.dim, p.top_k, p.dtype},
            num_threads);
    clock.lap(2);
  }

  // --- backward --------------------------------------------------------------------------------------------------
  // The tile holds grad_out @ down without the routing weight w. With s = sigmoid(gate), a = gate * s * up:
  // d_gate = w g up s (1 + gate (1 - s)), d_up = w g gate s, and w's own gradient is the sum of g a over columns.
  static void swiglu_grad_tile(const ExpertMlpBackward& p, int64_t row, int count, int64_t panel, const Scalar* c,
                               Scalar* weight_parts, int64_t num_panels) {
    const PanelColumns at = Panels<Math>::columns(panel, p.width);
    const auto* saved = static_cast<const Element*>(p.gate_up_rows);
    auto* grad = static_cast<Element*>(p.grad_gate_up_rows);
    auto* act = static_cast<Element*>(p.weighted_act_rows);
    for (int r = 0; r < count; ++r) {  // the rows' misses at once, not one after the other
      const Element* gate = saved + (row + r) * 2 * p.width + at.first[0];
      for (int64_t i = 0; i < columns; i += kElementsPerLine) {
        __builtin_prefetch(gate + i);
        __builtin_prefetch(gate + p.width + i);
      }
    }
    for (int r = 0; r < count; ++r, c += columns) {
      const int64_t base = (row + r) * 2 * p.width;
      const Scalar weight = weight_of(p.weights, p.slot_of_row, row + r);
      Vector weight_sum{};
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t n = at.count[v], column = at.first[v];
        if (n == 0) continue;
        const Vector gate = load_partial(saved + base + column, n);
        const Vector up = load_partial(saved + base + p.width + column, n);
        const Vector g = load<Vector>(c + v * lanes);
        const Vector s = sigmoid(gate);
        const Vector silu = gate * s;
        const Vector value = silu * up;
        const Vector upstream = g * weight;
        weight_sum += g * value;
        store_partial(grad + base + column, upstream * up * (s + silu * (1 - s)), n);
        store_partial(grad + base + p.width + column, upstream * silu, n);
        store_partial(act + (row + r) * p.width + column, value * weight, n);
      }
      weight_parts[(row + r) * num_panels + panel] = sum_lanes(weight_sum);
    }
  }

  static void activation_grad(const ExpertMlpBackward& p, int num_threads) {
    const int64_t panels = Panels<Math>::count(p.width);
    const int64_t num_rows = p.num_tokens * p.top_k;
    const Temporary<Scalar> weight_parts(num_rows * panels);
    const Rows<Element> grad_out{static_cast<const Element*>(p.grad_out), p.dim, p.slot_of_row, p.top_k};
    for_each_panel_task(p.offsets, p.num_experts, panels, num_threads, [&](const PanelTask& t) {
      const auto* matrix = static_cast<const Element*>(p.down) + t.expert * p.dim * p.width;
      const auto* kept = static_cast<const Unit*>(p.packed_down);
      if (kept) kept += t.expert * panel_units(p.dim, p.width);
      multiply_expert_rows<Math>(grad_out, p.offsets[t.expert], p.offsets[t.expert + 1], p.dim, t, kept,
                                 PackColumns<Math>{matrix, p.width},
                                 [&](int64_t row, int count, int64_t panel, const Scalar* c) {
                                   swiglu_grad_tile(p, row, count, panel, c, weight_parts.get(), panels);
                                 });
    });
    if (!p.grad_weights) return;
    for (int64_t row = 0; row < num_rows; ++row) {
      Scalar total = 0;
      for (int64_t i = 0; i < panels; ++i) total += weight_parts.get()[row * panels + i];
      static_cast<Scalar*>(p.grad_weights)[p.slot_of_row[row]] = total;
    }
  }

  static void input_grad(const ExpertMlpBackward& p, int num_threads) {
    const Rows<Element> grad{static_cast<const Element*>(p.grad_gate_up_rows), 2 * p.width};
    for_each_panel_task(p.offsets, p.num_experts, Panels<Math>::count(p.dim), num_threads, [&](const PanelTask& t) {
      const auto* matrix = static_cast<const Element*>(p.gate_up) + t.expert * 2 * p.width * p.dim;
      const auto* kept = static_cast<const Unit*>(p.packed_gate_up);
      if (kept) kept += t.expert * panel_units(2 * p.width, p.dim);
      multiply_expert_rows<Math>(grad, p.offsets[t.expert], p.offsets[t.expert + 1], 2 * p.width, t, kept,
                                 PackColumns<Math>{matrix, p.dim},
                                 [&](int64_t row, int count, int64_t panel, const Scalar* c) {
                                   store_tile<Math>(static_cast<Element*>(p.grad_x_rows), p.dim, row, count, panel, c,
                                                    [](int64_t) { return Scalar(1); });
                                 });
    });
  }

  static void backward(const ExpertMlpBackward& p, int num_threads) {
    PhaseClock clock(p.phase_seconds);
    activation_grad(p, num_threads);
    clock.lap(0);
    if (p.grad_x) {
      input_grad(p, num_threads);
      clock.lap(1);
      combine({p.grad_x_rows, nullptr, p.row_of_slot, p.grad_x, p.num_tokens, p.num_tokens * p.top_k, p.dim, p.top_k,
               p.dtype},
              num_threads);
      clock.lap(2);
    }
    const Rows<Element> x{static_cast<const Element*>(p.x), p.dim, p.slot_of_row, p.top_k};
    const Rows<Element> grad_out{static_cast<const Element*>(p.grad_out), p.dim, p.slot_of_row, p.top_k};
    const Rows<Element> grad_gate_up{static_cast<const Element*>(p.grad_gate_up_rows), 2 * p.width};
    const Rows<Element> act{static_cast<const Element*>(p.weighted_act_rows), p.width};
    const auto both = [&](auto* kind) {
      using Grad = std::remove_pointer_t<decltype(kind)>;
      const auto one = [&](const Rows<Element>& left, const Rows<Element>& right, void* out) {
        if (!out) return;
        multiply_weight_grads<Math>(left, right, p.offsets, p.num_experts, p.accumulate, static_cast<Grad*>(out),
                                    num_threads);
      };
      one(grad_out, act, p.grad_down);
      one(grad_gate_up, x, p.grad_gate_up);
    };
    if (p.weight_grad_dtype == p.dtype) {
      both(static_cast<Element*>(nullptr));
    } else {
      both(static_cast<Scalar*>(nullptr));
    }
    clock.lap(1);
  }
};

}  // namespace

void expert_mlp(const ExpertMlp& p, int num_threads) {
  if (p.dtype == DType::bf16) return Experts<Bf16Math>::forward(p, num_threads);
  if (p.dtype == DType::f32) return Experts<F32Math>::forward(p, num_threads);
  Experts<F64Math>::forward(p, num_threads);
}

void expert_mlp_backward(const ExpertMlpBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return Experts<Bf16Math>::backward(p, num_threads);
  if (p.dtype == DType::f32) return Experts<F32Math>::backward(p, num_threads);
  Experts<F64Math>::backward(p, num_threads);
}

int64_t packed_bytes(const PackWeights& p) {
  if (p.dtype == DType::bf16) return p.num_experts * Experts<Bf16Math>::units_per_expert(p) * 4;
  if (p.dtype == DType::f32) return p.num_experts * Experts<F32Math>::units_per_expert(p) * 4;
  return p.num_experts * Experts<F64Math>::units_per_expert(p) * 8;
}

void pack_weights(const PackWeights& p, int num_threads) {
  if (p.dtype == DType::bf16) return Experts<Bf16Math>::pack(p, num_threads);
  if (p.dtype == DType::f32) return Experts<F32Math>::pack(p, num_threads);
  Experts<F64Math>::pack(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
