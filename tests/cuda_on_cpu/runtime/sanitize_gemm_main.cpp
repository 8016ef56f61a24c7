// Every kind of matrix product from source in each order, eager and lazy, for AddressSanitizer and UBSan. Buffers are
// exactly as long as the op says; of the results, test_gemm.py checks all, and here a sum of ones is.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "executor.h"
#include "gemm/api.h"

namespace {

using namespace k25;

constexpr int64_t kRows = 150, kColumns = 72, kDepth = 144, kExperts = 2;
const int32_t kOffsets[kExperts + 1] = {0, 20, kRows};
constexpr uint16_t kBf16One = 0x3f80;
constexpr uint8_t kE4m3One = 0x38;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class Element>
using Buffer = std::unique_ptr<Element[], Free>;

// At a multiple of 64 bytes, as the ops need, with nothing behind it.
template <class Element>
Buffer<Element> filled(int64_t count, Element value) {
  void* space = nullptr;
  if (posix_memalign(&space, 64, size_t(count) * sizeof(Element)) != 0) std::abort();
  Buffer<Element> buffer(static_cast<Element*>(space));
  for (int64_t i = 0; i < count; ++i) buffer[size_t(i)] = value;
  return buffer;
}

bool all_are(const Buffer<float>& values, int64_t from, int64_t to, float expected) {
  for (int64_t i = from; i < to; ++i) {
    if (values[size_t(i)] != expected) return false;
  }
  return true;
}

bool run() {
  const auto a = filled(kRows * kDepth, kBf16One), b = filled(kExperts * kColumns * kDepth, kBf16One);
  const auto out = filled(kRows * kColumns, 0.0f);
  bool right = true;
  for (const bool transposed : {false, true}) {
    cuda::gemm_bf16({a.get(), b.get(), kOffsets, out.get(), kRows, kColumns, kDepth, kExperts, transposed, DType::f32},
                    nullptr);
    right &= all_are(out, 0, kRows * kColumns, float(kDepth));
  }
  const auto a8 = filled(kRows * kDepth, kE4m3One), b8 = filled(kExperts * kColumns * kDepth, kE4m3One);
  const auto a_scales = filled(kRows * 2, 2.0f), b_scales = filled(kExperts * 2, 0.5f);
  cuda::gemm_fp8({a8.get(), b8.get(), a_scales.get(), b_scales.get(), kOffsets, out.get(), kRows, kColumns, kDepth,
                  kExperts, DType::f32},
                 nullptr);
  right &= all_are(out, 0, kRows * kColumns, float(kDepth));
  const auto grads = filled(kExperts * kDepth * kColumns, 0.0f);
  const auto x = filled(kRows * kColumns, kBf16One);
  const int64_t one = kDepth * kColumns;
  for (const bool accumulate : {false, true}) {
    cuda::gemm_bf16_weight_grads(
        {a.get(), x.get(), kOffsets, grads.get(), kRows, kDepth, kColumns, kExperts, accumulate, DType::f32}, nullptr);
    right &= all_are(grads, 0, one, accumulate ? 40.0f : 20.0f);
    right &= all_are(grads, one, 2 * one, float(kRows - 20) * (accumulate ? 2.0f : 1.0f));
  }
  const int64_t rows = 144;  // of both experts: 128 and 16
  const int32_t offsets[] = {0, 128, 144};
  const auto scales = filled(rows * 2, 0.5f);
  cuda::gemm_fp8_weight_grads({a8.get(), b8.get(), a_scales.get(), scales.get(), offsets, grads.get(), rows, kDepth,
                               kColumns, kExperts, false, DType::f32},
                              nullptr);
  return right && all_are(grads, 0, one, 128.0f) && all_are(grads, one, 2 * one, 16.0f);
}

}  // namespace

int main() {
  for (const auto order : {cuda_on_cpu::Order::in_order, cuda_on_cpu::Order::reverse, cuda_on_cpu::Order::random}) {
    for (const bool lazy : {false, true}) {
      cuda_on_cpu::options() = {order, 1, false, lazy};
      try {
        if (run()) continue;
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
