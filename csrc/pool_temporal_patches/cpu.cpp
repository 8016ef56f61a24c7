#include "common/cpu/isa_functions.h"
#include "common/cpu/simd.h"
#include "common/threads.h"

namespace k25::cpu::K25_ISA {
namespace {

constexpr int64_t kRunsPerTask = 32;
constexpr int64_t kLineBytes = 64;

// A cache line of elements, in the vectors that they are computed in.
template <class Element>
struct Line {
  using Scalar = typename Compute<Element>::Scalar;
  using Vector = typename Compute<Element>::Vector;
  static constexpr int kCount = kLineBytes / sizeof(Element);
  static constexpr int kVectors = kCount * sizeof(Scalar) / sizeof(Vector);
  Vector v[kVectors];

  K25_INLINE void load(const Element* from) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = K25_ISA::load<Vector>(from + i * (kCount / kVectors));
  }
  K25_INLINE void store(Element* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) K25_ISA::store(to + i * (kCount / kVectors), v[i]);
  }
};

// Rounded to bf16 in the upper half of each word, to nearest even. A NaN needs no care: it comes from a bf16 or from
// the processor, with zeros in the lower half, and rounding leaves it as it is.
K25_INLINE U32V round_words(F32V value) {
  const U32V bits = (U32V)value;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// bf16: the even elements in one vector and the odd ones in the next. Both are a mask or a shift away from the 32-bit
// word that holds them, where widening in order costs a shuffle for each vector and narrowing three.
template <>
struct Line<Bf16> {
  using Scalar = float;
  using Vector = F32V;
  static constexpr int kCount = kLineBytes / 2;
  static constexpr int kVectors = kCount / kLanes;
  Vector v[kVectors];

  K25_INLINE void load(const Bf16* from) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += 2) {
      const U32V words = K25_ISA::load<U32V>(from + i * kLanes);
      v[i] = (F32V)(words << 16);
      v[i + 1] = (F32V)(words & 0xffff0000u);
    }
  }
  K25_INLINE void store(Bf16* to) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i += 2) {
      K25_ISA::store(to + i * kLanes, (round_words(v[i]) >> 16) | (round_words(v[i + 1]) & 0xffff0000u));
    }
  }
};

// Division by the number of frames, correctly rounded. Where the number is a power of two its reciprocal is exact.
template <class Scalar>
struct Share {
  Scalar frames, reciprocal;
  bool exact;

  explicit Share(int64_t count) : frames(Scalar(count)), reciprocal(1 / frames), exact((count & (count - 1)) == 0) {}
  template <class Vector, int kVectors>
  K25_INLINE void apply(Vector (&v)[kVectors]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = exact ? v[i] * reciprocal : v[i] / frames;
  }
};

// Where the runs of one thread lie, in the order of the result.
template <class Problem>
struct Walk {
  const Problem& p;
  const Clip* clip;
  int64_t out, row, column, in_neighbourhood;  // next neighbourhood, its top left patch, and the next run in it

  Walk(const Problem& problem, int64_t first_run) : p(problem), out(first_run / problem.merge_h) {
    int64_t low = 0, high = p.num_clips;  // the last clip that starts at `out` or before
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (p.clips[middle].first_out <= out ? low : high) = middle;
    }
    clip = p.clips + low;
    const int64_t across = clip->width / p.merge_w;
    row = (out - clip->first_out) / across * p.merge_h;
    column = (out - clip->first_out) % across * p.merge_w;
    in_neighbourhood = first_run % p.merge_h;
  }

  // The first patch of the next run in the clip's first frame.
  int64_t patch() const { return clip->first_patch + (row + in_neighbourhood) * clip->width + column; }

  int64_t frame() const { return clip->height * clip->width; }  // patches from one frame to the next

  void advance() {
    if (++in_neighbourhood < p.merge_h) return;
    in_neighbourhood = 0;
    column += p.merge_w;
    if (column < clip->width) return;
    column = 0;
    row += p.merge_h;
    if (row < clip->height) return;
    row = 0;
    ++clip;
  }
};

// Ordinary stores: past the caches neither direction was faster beyond the noise (35 to 57 MB, one thread), and a line
// at a time to each frame in turn was up to 1.8x slower where the frames lie in one bank of the memory.
template <class Element>
struct RunOps {
  using L = Line<Element>;
  using Scalar = typename L::Scalar;

  // to = the mean of `frames` rows of `count` elements, `frame` elements apart.
  static void mean(const Element* from, int64_t frame, int64_t frames, int64_t count, Element* to) {
    if (frames == 1) {
      std::memcpy(to, from, size_t(count) * sizeof(Element));
      return;
    }
    const Share<Scalar> share(frames);
    int64_t i = 0;
    for (; i + L::kCount <= count; i += L::kCount) {
      L sum, next;
      sum.load(from + i);
      for (int64_t f = 1; f < frames; ++f) {
        next.load(from + f * frame + i);
#pragma GCC unroll 8
        for (int v = 0; v < L::kVectors; ++v) sum.v[v] += next.v[v];
      }
      share.apply(sum.v);
      sum.store(to + i);
    }
    for (; i < count; ++i) {
      Scalar sum = load_scalar(from + i);
      for (int64_t f = 1; f < frames; ++f) sum += load_scalar(from + f * frame + i);
      store_scalar(to + i, sum / share.frames);
    }
  }

  // Each of `frames` rows, `frame` elements apart, gets its share of `from`.
  static void spread(const Element* from, int64_t frame, int64_t frames, int64_t count, Element* to) {
    if (frames == 1) {
      std::memcpy(to, from, size_t(count) * sizeof(Element));
      return;
    }
    const Share<Scalar> share(frames);
    int64_t i = 0;
    for (; i + L::kCount <= count; i += L::kCount) {
      L line;
      line.load(from + i);
      share.apply(line.v);
      for (int64_t f = 0; f < frames; ++f) line.store(to + f * frame + i);
    }
    for (; i < count; ++i) {
      for (int64_t f = 0; f < frames; ++f) store_scalar(to + f * frame + i, load_scalar(from + i) / share.frames);
    }
  }

  static void pool(const PoolTemporalPatches& p, int num_threads) {
    if (p.dim == 0) return;  // tensors without elements have no address
    const int64_t run = p.merge_w * p.dim;
    parallel_ranges(p.num_out * p.merge_h, kRunsPerTask, num_threads, [&](int64_t begin, int64_t end) {
      Walk<PoolTemporalPatches> walk(p, begin);
      for (int64_t r = begin; r < end; ++r, walk.advance()) {
        const auto* from = static_cast<const Element*>(p.x) + walk.patch() * p.dim;
        mean(from, walk.frame() * p.dim, walk.clip->frames, run, static_cast<Element*>(p.out) + r * run);
      }
    });
  }

  static void pool_backward(const PoolTemporalPatchesBackward& p, int num_threads) {
    if (p.dim == 0) return;  // tensors without elements have no address
    const int64_t run = p.merge_w * p.dim;
    parallel_ranges(p.num_out * p.merge_h, kRunsPerTask, num_threads, [&](int64_t begin, int64_t end) {
      Walk<PoolTemporalPatchesBackward> walk(p, begin);
      for (int64_t r = begin; r < end; ++r, walk.advance()) {
        auto* to = static_cast<Element*>(p.grad_x) + walk.patch() * p.dim;
        spread(static_cast<const Element*>(p.grad_out) + r * run, walk.frame() * p.dim, walk.clip->frames, run, to);
      }
    });
  }
};

}  // namespace

void pool_temporal_patches(const PoolTemporalPatches& p, int num_threads) {
  if (p.dtype == DType::bf16) return RunOps<Bf16>::pool(p, num_threads);
  if (p.dtype == DType::f32) return RunOps<float>::pool(p, num_threads);
  RunOps<double>::pool(p, num_threads);
}

void pool_temporal_patches_backward(const PoolTemporalPatchesBackward& p, int num_threads) {
  if (p.dtype == DType::bf16) return RunOps<Bf16>::pool_backward(p, num_threads);
  if (p.dtype == DType::f32) return RunOps<float>::pool_backward(p, num_threads);
  RunOps<double>::pool_backward(p, num_threads);
}

}  // namespace k25::cpu::K25_ISA
