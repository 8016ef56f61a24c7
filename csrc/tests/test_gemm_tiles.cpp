// Which tiles the matrix products choose on H800 (132 multiprocessors), for K2.5's experts and for small products.
#include <cstdlib>

#include "gemm/tile_choice.h"
#include "tests/expect.h"

namespace {

using namespace k25::cuda;
using k25::tests::expect;

constexpr int64_t kMultiprocessors = 132, kExperts = 24;  // of 384, on each of 16 ranks
constexpr int64_t kHidden = 7168, kWidth = 2048, kGateUp = 2 * kWidth;

struct Case {
  int64_t rows, columns, num_experts;
  int bf16, fp8;
};

// Forward and input gradients of the experts: rows are tokens of each expert, columns those of the result.
constexpr Case kOfExperts[] = {
    {16, kGateUp, kExperts, 256, 192},   {64, kGateUp, kExperts, 256, 192},   {128, kGateUp, kExperts, 256, 192},
    {256, kGateUp, kExperts, 256, 192},  {1024, kGateUp, kExperts, 256, 192}, {4096, kGateUp, kExperts, 256, 192},
    {16, kHidden, kExperts, 256, 192},   {128, kHidden, kExperts, 256, 192},  {512, kHidden, kExperts, 256, 192},
    {4096, kHidden, kExperts, 256, 192}, {16, kWidth, kExperts, 128, 192},    {128, kWidth, kExperts, 128, 192},
    {129, kWidth, kExperts, 256, 192},   {256, kWidth, kExperts, 256, 192},   {4096, kWidth, kExperts, 256, 192},
};
// Few tiles: narrow ones keep more multiprocessors busy. The shared expert of few tokens, and what fits in one tile.
constexpr Case kSmall[] = {
    {1, kGateUp, 1, 64, 64}, {128, kHidden, 1, 64, 64}, {256, kHidden, 1, 128, 128}, {128, 64, 1, 64, 64},
    {8, 8, 1, 64, 64},       {200, 264, 1, 64, 64},     {4096, 264, 1, 128, 128},
};

void check(const Case& c) {
  const ProductSizes sizes{c.rows * c.num_experts, c.columns, c.num_experts};
  const int bf16 = choose_tile_n(sizes, kBf16Widths, kMultiprocessors);
  const int fp8 = choose_tile_n(sizes, kFp8Widths, kMultiprocessors);
  char what[160];
  std::snprintf(what, sizeof(what), "%lld rows, %lld columns, %lld experts: bf16 %d, fp8 %d", (long long)c.rows,
                (long long)c.columns, (long long)c.num_experts, bf16, fp8);
  expect(bf16 == c.bf16 && fp8 == c.fp8, what);
}

// The header says so: what it does not know of the device changes nothing for K2.5.
void check_shares() {
  for (const Case& c : kOfExperts) {
    const ProductSizes sizes{c.rows * c.num_experts, c.columns, c.num_experts};
    for (const int64_t share : {48, 64, 128}) {
      const bool excepted = share == 128 && c.columns == kWidth;
      expect(excepted || choose_tile_n(sizes, kBf16Widths, kMultiprocessors, share) == c.bf16, "another share, bf16");
      expect(choose_tile_n(sizes, kFp8Widths, kMultiprocessors, share) == c.fp8, "another share, fp8");
    }
  }
}

}  // namespace

int main() {
  for (const Case& c : kOfExperts) check(c);
  for (const Case& c : kSmall) check(c);
  check_shares();
  for (const int64_t height : {kGateUp, kHidden}) {  // weight gradients: as many row tiles for any number of tokens
    const ProductSizes sizes{kExperts * height, height == kGateUp ? kHidden : kWidth, kExperts};
    expect(choose_tile_n(sizes, kBf16WeightGradWidths, kMultiprocessors) == 256, "weight gradients, bf16");
    expect(choose_tile_n(sizes, kFp8Widths, kMultiprocessors) == 192, "weight gradients, fp8");
  }
  std::printf("tiles: %s\n", k25::tests::failures() ? "FAILED" : "ok");
  return k25::tests::failures() ? EXIT_FAILURE : EXIT_SUCCESS;
}
