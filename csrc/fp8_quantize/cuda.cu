#include <algorithm>

#include "fp8_quantize/kernels.cuh"

namespace k25::cuda {
namespace {

constexpr int64_t kMaxGridY = 65535;

// f32 and bf16 alone: calls run(Element{}).
template <class Run>
void with_narrow_element(DType dtype, Run run) {
  if (dtype == DType::bf16) return run(Bf16{});
  run(float{});
}

template <class Element, bool kVectorized>
void launch(const QuantizeFp8& p, Stream stream) {
  const dim3 grid(unsigned(p.batch * fp8_tiles(p.rows)), unsigned(std::min(fp8_tiles(p.cols), kMaxGridY)));
  const auto kernel = &quantize_fp8_kernel<Element, kVectorized>;
  allow_shared_memory(kernel, kQuantizeBytes);
  K25_LAUNCH(kernel, grid, kQuantizeThreads, kQuantizeBytes, stream, p);
}

template <class Element, bool kVectorized>
void launch(const DequantizeFp8& p, Stream stream) {
  const int64_t columns = int64_t(kDequantizeThreads) * kPerAccess<Element, kVectorized>;
  const dim3 grid(unsigned(p.batch * p.rows), unsigned(std::min(ceil_div(p.cols, columns), kMaxGridY)));
  const auto kernel = &dequantize_fp8_kernel<Element, kVectorized>;
  K25_LAUNCH(kernel, grid, kDequantizeThreads, 0, stream, p);
}

template <class Problem>
void launch(const Problem& p, bool aligned, Stream stream) {
  if (p.batch * p.rows == 0 || p.cols == 0) return;
  with_narrow_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    if (aligned && p.cols * size_of(p.dtype) % 16 == 0) return launch<Element, true>(p, stream);
    launch<Element, false>(p, stream);
  });
}

}  // namespace

void quantize_fp8(const QuantizeFp8& p, Stream stream) { launch(p, aligned16(p.x), stream); }

void transpose_fp8(const TransposeFp8& p, Stream stream) {
  if (p.batch * p.rows == 0 || p.cols == 0) return;
  const dim3 grid(unsigned(p.batch * fp8_tiles(p.rows)), unsigned(std::min(fp8_tiles(p.cols), kMaxGridY)));
  const bool words = p.rows % 4 == 0 && p.cols % 4 == 0 && aligned16(p.values, p.values_transposed);
  const auto kernel = words ? &transpose_fp8_kernel<true> : &transpose_fp8_kernel<false>;
  K25_LAUNCH(kernel, grid, kTransposeThreads, kTransposeBytes, stream, p);
}

void dequantize_fp8(const DequantizeFp8& p, Stream stream) { launch(p, aligned16(p.out, p.values), stream); }

}  // namespace k25::cuda
