// The compute ceiling of this instruction set: the GEMM tile's multiply-adds on registers, with no memory access.
#include <ctime>

#include "common/cpu/isa_functions.h"
#include "grouped_gemm/math.h"

namespace k25::cpu::K25_ISA {
namespace {

double seconds_now() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

template <class Math>
double measure(double seconds) {
  using Unit = typename Math::Unit;
  using Scalar = typename Tile<Math>::Scalar;
  constexpr int64_t units = 4096 / Tile<Math>::kColumns;  // a strip that stays in the first-level cache
  alignas(64) static thread_local Unit a[kTileRows][units] = {}, b[units * Tile<Math>::kColumns] = {};
  alignas(64) Scalar c[kTileRows * Tile<Math>::kColumns] = {};
  const Unit* rows[kTileRows];
  for (int r = 0; r < kTileRows; ++r) rows[r] = a[r];
  const double flop = 2.0 * kTileRows * double(Tile<Math>::kColumns) * double(units) * Math::kElementsPerUnit;
  constexpr int calls = 200;
  const double start = seconds_now();
  double spent = 0;
  int64_t rounds = 0;
  for (; rounds == 0 || spent < seconds; ++rounds, spent = seconds_now() - start) {
    for (int i = 0; i < calls; ++i) multiply_tile<Math, kTileRows, 1>(units, rows, b, TileSink<Math>{c, true});
  }
  return double(rounds) * calls * flop / spent * 1e-9;
}

}  // namespace

double peak_gflops(DType dtype, double seconds) {
  if (dtype == DType::bf16) return measure<Bf16Math>(seconds);
  if (dtype == DType::f32) return measure<F32Math>(seconds);
  return measure<F64Math>(seconds);
}

}  // namespace k25::cpu::K25_ISA
