// Hopper's asynchronous instructions as functions: mbarriers, bulk tensor copies, wgmma. Under g++ the executor of
// tests/cuda_on_cpu supplies the same names. Also tensor maps, which the host makes.
#pragma once
#include <cuda.h>

#include <array>

#include "common/device.cuh"

namespace k25::cuda {

constexpr int kWarpgroupSize = 128;
constexpr int kSwizzleBytes = 128;  // of a row of every tile in shared memory
constexpr int kSwizzleRows = 8;     // after which the swizzle repeats
constexpr int kSwizzleRepeat = kSwizzleBytes * kSwizzleRows;
constexpr int kWgmmaDepthBytes = 32;  // of K in one wgmma, whatever the type

#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// The block's dynamic shared memory, aligned for swizzled tiles.
__device__ __forceinline__ uint8_t* aligned_shared_memory() {
  extern __shared__ __align__(1024) uint8_t block_tiles[];
  return block_tiles;
}

// ---- mbarriers

__device__ __forceinline__ void init_mbarrier(uint64_t* b, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
// Makes initializations visible to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives; the phase also waits for that many bytes of bulk copies.
__device__ __forceinline__ void arrive_expecting(uint64_t* b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Returns once the phase of that parity has completed; a new mbarrier's phase before the first has parity 1.
__device__ __forceinline__ void wait_for_phase(uint64_t* b, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred %%done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 %%done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, %%done;\n}"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- bulk tensor copies: coordinates are in elements, innermost first

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, uint64_t* b, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, uint64_t* b, int32_t x, int32_t y,
                                          int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ __forceinline__ void store_tile(const CUtensorMap* map, const void* from, int32_t x, int32_t y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
// Adds the tile, f32, to what global memory holds there.
__device__ __forceinline__ void add_tile(const CUtensorMap* map, const void* from, int32_t x, int32_t y) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the latest kPending groups of this thread have read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_stores_to_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// What this thread wrote to shared memory becomes visible to bulk copies and wgmma behind the next barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warps

__device__ __forceinline__ void named_barrier(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
// True in one lane of the warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred %%elected;\n"
      "elect.sync _|%%elected, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, %%elected;\n}"
      : "=r"(elected));
  return elected;
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
// Four 8x8 matrices of bf16; lane 8 j + r gives the place of row r of matrix j.
__device__ __forceinline__ void store_matrices(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// ---- wgmma: sums (+)= A B^T for 64 rows of A, kCount * 2 rows of B and 32 bytes of K

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Keeps nvcc from moving other uses of accumulators across the wgmma instructions around it: those name no registers.
template <int kCount>
__device__ __forceinline__ void hold_accumulators(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// clang-format off: the places of operands are easier to check in columns
#define K25_SUMS_8(i)                                                                                           \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define K25_SUMS_32(i) K25_SUMS_8(i), K25_SUMS_8(i + 8), K25_SUMS_8(i + 16), K25_SUMS_8(i + 24)

#define K25_NAMES_32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define K25_NAMES_64                                                                       \
  K25_NAMES_32                                                                             \
      ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define K25_NAMES_96                                                                       \
  K25_NAMES_64                                                                             \
      ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

#define K25_NAMES_128                                                                                  \
  K25_NAMES_96                                                                                         \
      ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The operands behind the accumulators: both descriptors, whether to accumulate, and immediates.
#define K25_WGMMA(shape, names, descriptors, accumulates, immediates, ...)                                            \
  asm volatile("{\n.reg .pred %%accumulate;\nsetp.ne.b32 %%accumulate, " accumulates                                  \
               ", 0;\nwgmma.mma_async.sync.aligned." shape " {" names "}, " descriptors ", %%accumulate, " immediates \
               ";\n}"                                                                                                 \
               : __VA_ARGS__)
// clang-format on

template <bool kMnMajorA, bool kMnMajorB>
__device__ __forceinline__ void wgmma_bf16(float (&sums)[32], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n64k16.f32.bf16.bf16", K25_NAMES_32, "%32, %33", "%34", "1, 1, %35, %36", K25_SUMS_32(0) : "l"(a),
            "l"(b), "r"(int(accumulate)), "n"(int(kMnMajorA)), "n"(int(kMnMajorB)));
}

template <bool kMnMajorA, bool kMnMajorB>
__device__ __forceinline__ void wgmma_bf16(float (&sums)[64], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n128k16.f32.bf16.bf16", K25_NAMES_64, "%64, %65", "%66", "1, 1, %67, %68", K25_SUMS_32(0),
            K25_SUMS_32(32) : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMnMajorA)), "n"(int(kMnMajorB)));
}

template <bool kMnMajorA, bool kMnMajorB>
__device__ __forceinline__ void wgmma_bf16(float (&sums)[128], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n256k16.f32.bf16.bf16", K25_NAMES_128, "%128, %129", "%130", "1, 1, %131, %132", K25_SUMS_32(0),
            K25_SUMS_32(32), K25_SUMS_32(64), K25_SUMS_32(96) : "l"(a), "l"(b), "r"(int(accumulate)),
            "n"(int(kMnMajorA)), "n"(int(kMnMajorB)));
}

__device__ __forceinline__ void wgmma_e4m3(float (&sums)[32], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n64k32.f32.e4m3.e4m3", K25_NAMES_32, "%32, %33", "%34", "1, 1", K25_SUMS_32(0) : "l"(a), "l"(b),
            "r"(int(accumulate)));
}

__device__ __forceinline__ void wgmma_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n128k32.f32.e4m3.e4m3", K25_NAMES_64, "%64, %65", "%66", "1, 1", K25_SUMS_32(0),
            K25_SUMS_32(32) : "l"(a), "l"(b), "r"(int(accumulate)));
}

__device__ __forceinline__ void wgmma_e4m3(float (&sums)[96], uint64_t a, uint64_t b, bool accumulate) {
  K25_WGMMA("m64n192k32.f32.e4m3.e4m3", K25_NAMES_96, "%96, %97", "%98", "1, 1", K25_SUMS_32(0), K25_SUMS_32(32),
            K25_SUMS_32(64) : "l"(a), "l"(b), "r"(int(accumulate)));
}

#undef K25_SUMS_8
#undef K25_SUMS_32
#undef K25_NAMES_32
#undef K25_NAMES_64
#undef K25_NAMES_96
#undef K25_NAMES_128
#undef K25_WGMMA
#endif

// Of a tile with 128-byte swizzle for wgmma. K-major (a row of memory for each row of the operand): `stride` is from 8
// rows to the next 8, `leading` is not used. MN-major (a row of memory for 64 rows of the operand at one k): `stride`
// is from 8 k to the next 8, `leading` from 64 rows to the next 64.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return kSwizzle128 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 |
         (shared_address(tile) & 0x3ffff) >> 4;
}
// What to add to a descriptor to move it by that many bytes.
__device__ __forceinline__ constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

// Where the 16 bytes number `unit` of a row of a swizzled tile lie.
__device__ __forceinline__ uint8_t* swizzled_unit(uint8_t* tile, int row, int unit) {
  return tile + row * kSwizzleBytes + (unit ^ row % kSwizzleRows) * 16;
}

// ---- host side

// A row-major tensor of up to 3 dimensions, innermost first, and the box of it that one copy moves.
struct TensorBox {
  const void* address;
  CUtensorMapDataType type;
  uint32_t rank;
  std::array<uint64_t, 3> sizes;    // elements
  std::array<uint64_t, 2> strides;  // bytes, of the dimensions behind the innermost
  std::array<uint32_t, 3> box;      // elements; the innermost fill kSwizzleBytes or fewer
};

// Throws std::runtime_error if there is no driver or it refuses the tensor.
CUtensorMap tensor_map_of(const TensorBox& tensor);

}  // namespace k25::cuda
