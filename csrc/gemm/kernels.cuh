// One persistent kernel for every product: a producer warp loads tiles of A and B with bulk copies, two warpgroups
// multiply 64 rows each. mbarriers `full` and `empty` pass the stages between them.
#pragma once
#include "common/hopper.cuh"
#include "gemm/api.h"
#include "gemm/tile_choice.h"

namespace k25::cuda {

constexpr int kConsumers = 2;  // warpgroups, which share a tile's rows
constexpr int kRowsPerConsumer = kTileM / kConsumers;
constexpr int kConsumerWarps = kConsumers * kWarpgroupSize / kWarpSize;
constexpr int kGemmThreads = (kConsumers + 1) * kWarpgroupSize;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kScaleProducerRegisters = 56, kScaledConsumerRegisters = 224;  // where warps gather scales
constexpr int kScaleBlock = 128;       // elements of K, and rows of B, with one scale
constexpr int kRowTilesTogether = 16;  // walked together, so that their rows of A and the columns of B stay in L2

constexpr int kChunkBytes = kRowsPerConsumer * kSwizzleBytes;  // of the result, as it is stored
constexpr int kChunkBuffers = 2;                               // of each consumer
constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kBarrierBytes = 1024;

struct Bf16Operands {
  static constexpr int kBytes = 2;
};
struct E4m3Operands {
  static constexpr int kBytes = 1;
};

// What is multiplied. `rows`: rows of A by B, (N, K) for each expert. `transposed_b`: B is (K, N), its tiles are
// MN-major. `weight_grads`: A is (K, M) and B (K, N), an expert's K are its rows of both, and the result has M rows for
// each expert. FP8 operands are always K-major: of its weight gradients A is (M, K) and B (N, K), and an expert begins
// at a multiple of kScaleBlock.
enum class GemmKind { rows, transposed_b, weight_grads };

template <class Operands_, int kTileN_, GemmKind kKind_ = GemmKind::rows>
struct GemmConfig {
  using Operands = Operands_;
  static constexpr GemmKind kKind = kKind_;
  static constexpr int kTileN = kTileN_;
  static constexpr bool kWeightGrads = kKind == GemmKind::weight_grads;
  static constexpr bool kScaled = Operands::kBytes == 1;
  static constexpr bool kMnMajorA = kWeightGrads && !kScaled, kMnMajorB = kKind != GemmKind::rows && !kScaled;
  static_assert(!kScaled || kKind != GemmKind::transposed_b);
  static constexpr int kTileK = kSwizzleBytes / Operands::kBytes;
  static constexpr int kSums = kTileN / 2;  // of a thread
  static constexpr int kBytesA = kTileM * kSwizzleBytes, kBytesB = kTileN * kSwizzleBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  // An MN-major tile is made of boxes: 64 rows or columns of the operand wide, and kTileK high.
  static constexpr int kBoxWidth = kSwizzleBytes / Operands::kBytes, kBoxBytes = kTileK * kSwizzleBytes;
  // Each row of both operands has scales of its own, which pass through shared memory.
  static constexpr bool kScalesInStages = kScaled && kWeightGrads;
  static constexpr int kScaleBytes = kScalesInStages ? (kTileM + kTileN) * int(sizeof(float)) : 0;  // of a stage
  static constexpr int kEpilogueBytes = kConsumers * kChunkBuffers * kChunkBytes;
  static constexpr int kStages = (kMaxSharedBytes - kEpilogueBytes - kBarrierBytes) / (kStageBytes + kScaleBytes);
  static constexpr int kSharedBytes = kStages * (kStageBytes + kScaleBytes) + kEpilogueBytes + kBarrierBytes;
  static_assert(kStages >= 4 && kStages * 16 <= kBarrierBytes);
  static_assert(!kScaled || kTileK == kScaleBlock);
};

struct GemmParams {
  const int32_t* offsets;
  const float* a_scales;
  const float* b_scales;
  void* out;
  int rows, columns;  // of the result
  int depth;          // K, or all rows of both operands of weight gradients
  int num_experts;
  bool out_is_f32;
  bool whole_tiles_by_bulk_store;  // the result's rows are multiples of 16 bytes, and it is f32 where it is added to
  bool accumulate;                 // weight gradients: adds to the result
};

struct Tile {
  int expert, row, column;     // of the result
  int end_of_expert;           // row
  int depth_start, depth_end;  // along K
};

// The tiles of one block in order: all blocks walk the same list, each takes every gridDim.x-th tile. A tile never
// spans two experts. Within an expert, kRowTilesTogether row tiles go together over the columns.
template <class Config>
class TileWalk {
 public:
  __device__ __forceinline__ explicit TileWalk(const GemmParams& p)
      : p_(p), column_tiles_((p.columns + Config::kTileN - 1) / Config::kTileN), next_(int(blockIdx.x)) {
    enter(0);
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    while (next_ >= first_ + count_) {
      if (expert_ + 1 >= p_.num_experts) return false;
      first_ += count_;
      enter(expert_ + 1);
    }
    const int index = next_ - first_, row_tiles = count_ / column_tiles_;
    const int together = kRowTilesTogether * column_tiles_;
    const int first_row_tile = index / together * kRowTilesTogether;
    const int height = min(kRowTilesTogether, row_tiles - first_row_tile), within = index % together;
    tile.expert = expert_;
    tile.row = begin_ + (first_row_tile + within % height) * kTileM;
    tile.column = within / height * Config::kTileN;
    tile.end_of_expert = end_;
    tile.depth_start = depth_start_;
    tile.depth_end = depth_end_;
    next_ += int(gridDim.x);
    return true;
  }

 private:
  __device__ __forceinline__ void enter(int expert) {
    const int all = Config::kWeightGrads ? p_.depth : p_.rows;
    const int first = p_.offsets ? __ldg(p_.offsets + expert) : 0;
    const int end = p_.offsets ? __ldg(p_.offsets + expert + 1) : all;
    require(0 <= first && first <= end && end <= all);
    if constexpr (Config::kScalesInStages) {  // no tile of K, and no scale, belongs to two experts
      require(first % kScaleBlock == 0 && (end % kScaleBlock == 0 || end == all));
    }
    const int height = p_.rows / p_.num_experts;  // of one expert's weight gradients
    expert_ = expert;
    begin_ = Config::kWeightGrads ? expert * height : first;
    end_ = Config::kWeightGrads ? begin_ + height : end;
    depth_start_ = Config::kWeightGrads ? first : 0;
    depth_end_ = Config::kWeightGrads ? end : p_.depth;
    count_ = (end_ - begin_ + kTileM - 1) / kTileM * column_tiles_;
  }

  const GemmParams& p_;
  int column_tiles_;
  int next_, first_ = 0, count_;  // tiles of all experts: the next one, those before this expert, its own
  int expert_, begin_, end_, depth_start_, depth_end_;
};

template <class Config>
__device__ __forceinline__ int depth_tiles(const Tile& tile) {
  return (tile.depth_end - tile.depth_start + Config::kTileK - 1) / Config::kTileK;
}

// The stage that a role is at, and the parity of the phase that it waits for in `full`.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <class Config>
struct GemmShared {
  uint8_t* base;
  __device__ __forceinline__ uint8_t* a(int stage) const { return base + stage * Config::kStageBytes; }
  __device__ __forceinline__ uint8_t* b(int stage) const { return a(stage) + Config::kBytesA; }
  __device__ __forceinline__ uint8_t* chunks(int consumer) const {
    return base + Config::kStages * Config::kStageBytes + consumer * kChunkBuffers * kChunkBytes;
  }
  // Of the tile's rows of A, then of B.
  __device__ __forceinline__ float* scales(int stage) const {
    return reinterpret_cast<float*>(chunks(kConsumers) + stage * Config::kScaleBytes);
  }
  __device__ __forceinline__ uint64_t* full() const { return reinterpret_cast<uint64_t*>(scales(Config::kStages)); }
  __device__ __forceinline__ uint64_t* empty() const { return full() + Config::kStages; }
};

// ---- the producer: one thread, and two warps for scales that pass through shared memory

// Calls load(place in shared memory, first row or column) for each box of an MN-major tile.
template <class Config, int kBoxes, class Load>
__device__ __forceinline__ void load_boxes(uint8_t* to, Load load) {
#pragma unroll
  for (int i = 0; i < kBoxes; ++i) load(to + i * Config::kBoxBytes, i * Config::kBoxWidth);
}

// The first row (or column) of A of a tile of weight gradients: all experts share A's.
__device__ __forceinline__ int row_of_operand(const GemmParams& p, const Tile& tile) {
  return tile.row - tile.expert * (p.rows / p.num_experts);
}

template <class Config>
__device__ __forceinline__ void load_stage(const GemmShared<Config>& shared, const CUtensorMap* map_a,
                                           const CUtensorMap* map_b, const GemmParams& p, const Tile& tile, int k,
                                           int stage) {
  uint64_t* full = shared.full() + stage;
  const int depth = tile.depth_start + k * Config::kTileK;
  arrive_expecting(full, Config::kStageBytes);
  const int first = Config::kWeightGrads ? row_of_operand(p, tile) : tile.row;
  if constexpr (Config::kMnMajorA) {
    load_boxes<Config, kTileM / Config::kBoxWidth>(
        shared.a(stage), [&](uint8_t* to, int column) { load_tile(to, map_a, full, first + column, depth); });
  } else {
    load_tile(shared.a(stage), map_a, full, depth, first);
  }
  if constexpr (Config::kScalesInStages) {
    load_tile(shared.b(stage), map_b, full, depth, tile.column);
  } else if constexpr (!Config::kMnMajorB) {
    load_tile(shared.b(stage), map_b, full, depth, tile.expert * p.columns + tile.column);
  } else {
    load_boxes<Config, Config::kTileN / Config::kBoxWidth>(shared.b(stage), [&](uint8_t* to, int column) {
      if constexpr (Config::kWeightGrads) {
        load_tile(to, map_b, full, tile.column + column, depth);
      } else {
        load_tile(to, map_b, full, tile.column + column, depth, tile.expert);
      }
    });
  }
}

template <class Config>
__device__ __forceinline__ void produce(const GemmShared<Config>& shared, const CUtensorMap* map_a,
                                        const CUtensorMap* map_b, const GemmParams& p) {
  TileWalk<Config> walk(p);
  Ring<Config::kStages> ring;
  Tile tile;
  while (walk.next(tile)) {
    const int num_steps = depth_tiles<Config>(tile);
#pragma unroll 1
    for (int k = 0; k < num_steps; ++k) {
      wait_for_phase(shared.empty() + ring.stage, ring.parity ^ 1);
      load_stage(shared, map_a, map_b, p, tile, k, ring.stage);
      ring.advance();
    }
  }
}

// The scales of weight gradients, of the tile's rows of A or of B: those of one stage lie far apart in global memory,
// so that a warp for each operand gathers them, as far ahead as there are stages.
template <class Config, bool kOfA>
__device__ __forceinline__ void produce_scales(const GemmShared<Config>& shared, const GemmParams& p) {
  constexpr int kPerLane = (kOfA ? kTileM : Config::kTileN) / kWarpSize;
  const int lane = int(threadIdx.x) % kWarpSize, scales_per_row = (p.depth + kScaleBlock - 1) / kScaleBlock;
  const int last_row = (kOfA ? p.rows / p.num_experts : p.columns) - 1;
  TileWalk<Config> walk(p);
  Ring<Config::kStages> ring;
  Tile tile;
  while (walk.next(tile)) {
    const int num_steps = depth_tiles<Config>(tile), row = (kOfA ? row_of_operand(p, tile) : tile.column) + lane;
    const float* first = (kOfA ? p.a_scales : p.b_scales) + tile.depth_start / kScaleBlock;
    const float* from[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) from[i] = first + int64_t(min(row + i * kWarpSize, last_row)) * scales_per_row;
#pragma unroll 1
    for (int k = 0; k < num_steps; ++k) {
      float values[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = __ldg(from[i] + k);
      wait_for_phase(shared.empty() + ring.stage, ring.parity ^ 1);
      float* to = shared.scales(ring.stage) + (kOfA ? 0 : kTileM) + lane;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) to[i * kWarpSize] = values[i];
      __syncwarp();
      if (lane == 0) arrive(shared.full() + ring.stage);
      ring.advance();
    }
  }
}

// ---- the consumers

// A warp's part in freeing a stage: all its reads are done once it has waited for the wgmma.
template <class Config>
__device__ __forceinline__ void free_stage(const GemmShared<Config>& shared, int stage) {
  if (threadIdx.x % kWarpSize == 0) arrive(shared.empty() + stage);
}

// Issues the products of one stage.
template <class Config>
__device__ __forceinline__ void multiply_stage(const GemmShared<Config>& shared, int consumer, int stage,
                                               bool accumulate, float (&sums)[Config::kSums]) {
  constexpr int kBoxStep = kWgmmaDepthBytes / Config::Operands::kBytes * kSwizzleBytes;
  constexpr int kStepA = Config::kMnMajorA ? kBoxStep : kWgmmaDepthBytes;
  constexpr int kStepB = Config::kMnMajorB ? kBoxStep : kWgmmaDepthBytes;
  // A consumer's rows of A are one box where A is MN-major, and as many bytes where it is K-major.
  static_assert(!Config::kMnMajorA || Config::kBoxBytes == kRowsPerConsumer * kSwizzleBytes);
  const uint64_t a =
      matrix_descriptor(shared.a(stage) + consumer * kRowsPerConsumer * kSwizzleBytes, 0, kSwizzleRepeat);
  const uint64_t b = matrix_descriptor(shared.b(stage), Config::kMnMajorB ? Config::kBoxBytes : 0, kSwizzleRepeat);
  hold_accumulators(sums);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kSwizzleBytes / kWgmmaDepthBytes; ++i) {
    const uint64_t step_a = a + descriptor_step(i * kStepA), step_b = b + descriptor_step(i * kStepB);
    if constexpr (Config::kScaled) {
      wgmma_e4m3(sums, step_a, step_b, accumulate || i > 0);
    } else {
      wgmma_bf16<Config::kMnMajorA, Config::kMnMajorB>(sums, step_a, step_b, accumulate || i > 0);
    }
  }
  wgmma_commit();
}

// The rows of the stage's tiles that lie behind the expert's last one become zeros, in both operands: the next
// expert's may be infinite. All consumers do this together.
template <class Config>
__device__ __forceinline__ void clear_rows_behind(const GemmShared<Config>& shared, int stage, int num_rows) {
  constexpr int kUnitsPerRow = kSwizzleBytes / 16, kUnitsPerBox = Config::kBoxBytes / 16;
  constexpr int kBoxes = Config::kStageBytes / Config::kBoxBytes;
  auto* units = reinterpret_cast<uint4*>(shared.a(stage));
  const int cleared = (Config::kTileK - num_rows) * kUnitsPerRow;  // of each box
#pragma unroll 1
  for (int i = int(threadIdx.x); i < kBoxes * cleared; i += kConsumers * kWarpgroupSize) {
    units[i / cleared * kUnitsPerBox + num_rows * kUnitsPerRow + i % cleared] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  named_barrier(1 + kConsumers, kConsumers * kWarpgroupSize);
}

// One wgmma group stays in flight while the next stage is waited for.
template <class Config>
__device__ __forceinline__ void multiply_tile(const GemmShared<Config>& shared, const Tile& tile, int consumer,
                                              Ring<Config::kStages>& ring, float (&sums)[Config::kSums]) {
  const int num_steps = depth_tiles<Config>(tile);
  if constexpr (Config::kWeightGrads) {  // there may be nothing to add
#pragma unroll
    for (int i = 0; i < Config::kSums; ++i) sums[i] = 0;
  }
  int previous = 0;
#pragma unroll 1
  for (int k = 0; k < num_steps; ++k) {
    wait_for_phase(shared.full() + ring.stage, ring.parity);
    if constexpr (Config::kWeightGrads) {
      const int left = tile.depth_end - tile.depth_start - k * Config::kTileK;
      if (left < Config::kTileK) clear_rows_behind(shared, ring.stage, left);
    }
    multiply_stage<Config>(shared, consumer, ring.stage, Config::kWeightGrads || k > 0, sums);
    wgmma_wait<1>();
    if (k > 0) free_stage(shared, previous);
    previous = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  hold_accumulators(sums);
  if (num_steps > 0) free_stage(shared, previous);
}

// The first row of the tile's fragment that this thread has; it also has the row 8 below. Its columns are
// 8 j + first_column() and the next, for j = 0, 1, ...
__device__ __forceinline__ int first_row() {
  const int thread = int(threadIdx.x) % kWarpgroupSize;
  return thread / kWarpSize * 16 + thread % kWarpSize / 4;
}
__device__ __forceinline__ int first_column() { return int(threadIdx.x) % 4 * 2; }

// Products of 128 elements of K are scaled and added up in `sums`: the tensor cores sum with fewer bits than f32.
template <class Config>
__device__ __forceinline__ void multiply_scaled_tile(const GemmShared<Config>& shared, const GemmParams& p,
                                                     const Tile& tile, int consumer, Ring<Config::kStages>& ring,
                                                     float (&sums)[Config::kSums]) {
  constexpr int kBlocks = Config::kTileN <= kScaleBlock ? 1 : Config::kTileN / (kScaleBlock / 2);
  constexpr int kSumsPerBlock = Config::kSums / kBlocks;
  const int row = tile.row + consumer * kRowsPerConsumer + first_row(), last_row = p.rows - 1;
  const int num_steps = depth_tiles<Config>(tile);
  const float* scales_above = p.a_scales + int64_t(min(row, last_row)) * num_steps;
  const float* scales_below = p.a_scales + int64_t(min(row + 8, last_row)) * num_steps;
  const int scale_rows = (p.columns + kScaleBlock - 1) / kScaleBlock;
  const float* scales_b[kBlocks];
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int block = min((tile.column + i * (Config::kTileN / kBlocks)) / kScaleBlock, scale_rows - 1);
    scales_b[i] = p.b_scales + (int64_t(tile.expert) * scale_rows + block) * num_steps;
  }
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i) sums[i] = 0;
  float products[Config::kSums];
#pragma unroll 1
  for (int k = 0; k < num_steps; ++k) {
    const float above = __ldg(scales_above + k), below = __ldg(scales_below + k);
    float scale_b[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) scale_b[i] = __ldg(scales_b[i] + k);
    wait_for_phase(shared.full() + ring.stage, ring.parity);
    multiply_stage<Config>(shared, consumer, ring.stage, false, products);
    wgmma_wait<0>();
    hold_accumulators(products);
    free_stage(shared, ring.stage);
    ring.advance();
#pragma unroll
    for (int i = 0; i < Config::kSums; ++i) {
      const float scale = (i / 2 % 2 ? below : above) * scale_b[i / kSumsPerBlock];
      sums[i] = fma(products[i], scale, sums[i]);
    }
  }
}

// The same where each row of B has a scale too.
template <class Config>
__device__ __forceinline__ void multiply_tile_with_scaled_columns(const GemmShared<Config>& shared, const Tile& tile,
                                                                  int consumer, Ring<Config::kStages>& ring,
                                                                  float (&sums)[Config::kSums]) {
  const int num_steps = depth_tiles<Config>(tile);
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i) sums[i] = 0;
  float products[Config::kSums];
#pragma unroll 1
  for (int k = 0; k < num_steps; ++k) {
    wait_for_phase(shared.full() + ring.stage, ring.parity);
    multiply_stage<Config>(shared, consumer, ring.stage, false, products);
    wgmma_wait<0>();
    hold_accumulators(products);
    const float* rows = shared.scales(ring.stage) + consumer * kRowsPerConsumer + first_row();
    const float* columns = shared.scales(ring.stage) + kTileM + first_column();
    const float above = rows[0], below = rows[8];
#pragma unroll
    for (int i = 0; i < Config::kSums; i += 4) {
      const float2 scales = *reinterpret_cast<const float2*>(columns + 2 * i);
      sums[i] = fma(products[i], above * scales.x, sums[i]);
      sums[i + 1] = fma(products[i + 1], above * scales.y, sums[i + 1]);
      sums[i + 2] = fma(products[i + 2], below * scales.x, sums[i + 2]);
      sums[i + 3] = fma(products[i + 3], below * scales.y, sums[i + 3]);
    }
    __syncwarp();  // all lanes have read the scales
    free_stage(shared, ring.stage);
    ring.advance();
  }
}

// ---- the result

// Registers to a chunk of 128-byte rows in shared memory: 64 columns of bf16, or 32 of f32, from `first` on.
template <bool kF32, int kSums>
__device__ __forceinline__ void write_chunk(uint8_t* chunk, const float (&sums)[kSums], int first) {
  if constexpr (kF32) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* from = sums + first / 2 + 4 * j;
      const int unit = 2 * j + first_column() / 4, within = first_column() % 4;
      auto* above = reinterpret_cast<float2*>(swizzled_unit(chunk, first_row(), unit)) + within / 2;
      auto* below = reinterpret_cast<float2*>(swizzled_unit(chunk, first_row() + 8, unit)) + within / 2;
      *above = make_float2(from[0], from[1]);
      *below = make_float2(from[2], from[3]);
    }
  } else {
    const int lane = int(threadIdx.x) % kWarpSize, warp = int(threadIdx.x) % kWarpgroupSize / kWarpSize;
    const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* from = sums + first / 2 + 8 * j;
      store_matrices(swizzled_unit(chunk, row, 2 * j + lane / 16), to_bf16_pair(from[0], from[1]),
                     to_bf16_pair(from[2], from[3]), to_bf16_pair(from[4], from[5]), to_bf16_pair(from[6], from[7]));
    }
  }
}

// A tile whose rows all belong to the expert, or end with the result: bulk stores leave out what lies outside it.
template <bool kF32, class Config>
__device__ __forceinline__ void store_whole(const GemmShared<Config>& shared, const CUtensorMap* map_out,
                                            const GemmParams& p, const Tile& tile, int consumer, int& buffer,
                                            const float (&sums)[Config::kSums]) {
  constexpr int kColumns = kSwizzleBytes / (kF32 ? 4 : 2);
  const bool leads = threadIdx.x % kWarpgroupSize == 0;
  const int row = tile.row + consumer * kRowsPerConsumer;
#pragma unroll
  for (int first = 0; first < Config::kTileN; first += kColumns) {
    if (tile.column + first >= p.columns || row >= p.rows) break;
    uint8_t* chunk = shared.chunks(consumer) + buffer * kChunkBytes;
    if (leads) wait_for_stores_to_read<kChunkBuffers - 1>();
    named_barrier(1 + consumer, kWarpgroupSize);
    write_chunk<kF32>(chunk, sums, first);
    fence_async_proxy();
    named_barrier(1 + consumer, kWarpgroupSize);
    if (leads) {
      if (Config::kWeightGrads && kF32 && p.accumulate) {
        add_tile(map_out, chunk, tile.column + first, row);
      } else {
        store_tile(map_out, chunk, tile.column + first, row);
      }
      commit_stores();
    }
    buffer = (buffer + 1) % kChunkBuffers;
  }
}

__device__ __forceinline__ float value_at(const float* p) { return *p; }
__device__ __forceinline__ float value_at(const Bf16* p) { return __uint_as_float(uint32_t(p->bits) << 16); }

__device__ __forceinline__ void store_pair(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}
__device__ __forceinline__ void store_pair(Bf16* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = to_bf16_pair(low, high);
}

// A tile that ends within its expert's last rows: the rows behind them are another expert's. Also one of bf16 that is
// added to: rounded once, where a bulk copy would round the tile and then the sum.
template <class Element, class Config>
__device__ __forceinline__ void store_ragged(const GemmParams& p, const Tile& tile, int consumer,
                                             const float (&sums)[Config::kSums]) {
  const int top = tile.row + consumer * kRowsPerConsumer + first_row(), left = tile.column + first_column();
  const bool in_pairs = p.columns % 2 == 0;
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 2) {
    const int row = top + i / 2 % 2 * 8, column = left + i / 4 * 8;
    if (row >= tile.end_of_expert || column >= p.columns) continue;
    Element* to = static_cast<Element*>(p.out) + int64_t(row) * p.columns + column;
    const bool has_right = column + 1 < p.columns, adds = Config::kWeightGrads && p.accumulate;
    const float low = adds ? value_at(to) + sums[i] : sums[i];
    const float high = adds && has_right ? value_at(to + 1) + sums[i + 1] : sums[i + 1];
    if (in_pairs) {
      store_pair(to, low, high);
    } else {
      store_one(to, low);
      if (has_right) store_one(to + 1, high);
    }
  }
}

template <class Config>
__device__ __forceinline__ void consume(const GemmShared<Config>& shared, const CUtensorMap* map_out,
                                        const GemmParams& p, int consumer) {
  TileWalk<Config> walk(p);
  Ring<Config::kStages> ring;
  Tile tile;
  int buffer = 0;
  while (walk.next(tile)) {
    if (Config::kWeightGrads && p.accumulate && tile.depth_start == tile.depth_end) continue;  // nothing to add
    float sums[Config::kSums];
    if constexpr (Config::kScalesInStages) {
      multiply_tile_with_scaled_columns<Config>(shared, tile, consumer, ring, sums);
    } else if constexpr (Config::kScaled) {
      multiply_scaled_tile<Config>(shared, p, tile, consumer, ring, sums);
    } else {
      multiply_tile<Config>(shared, tile, consumer, ring, sums);
    }
    const bool whole = tile.row + kTileM <= tile.end_of_expert || tile.end_of_expert == p.rows;
    if (whole && p.whole_tiles_by_bulk_store) {
      if (p.out_is_f32) {
        store_whole<true>(shared, map_out, p, tile, consumer, buffer, sums);
      } else {
        store_whole<false>(shared, map_out, p, tile, consumer, buffer, sums);
      }
    } else if (p.out_is_f32) {
      store_ragged<float, Config>(p, tile, consumer, sums);
    } else {
      store_ragged<Bf16, Config>(p, tile, consumer, sums);
    }
  }
  if (threadIdx.x % kWarpgroupSize == 0) wait_for_stores_to_read<0>();
}

template <class Config>
__global__ void __launch_bounds__(kGemmThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_out, const __grid_constant__ GemmParams p) {
  const GemmShared<Config> shared{aligned_shared_memory()};
  if (threadIdx.x == 0) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    if (p.whole_tiles_by_bulk_store) prefetch_map(&map_out);
    for (int i = 0; i < Config::kStages; ++i) {
      init_mbarrier(shared.full() + i, Config::kScalesInStages ? 3 : 1);
      init_mbarrier(shared.empty() + i, kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = int(threadIdx.x) / kWarpgroupSize;
  if (warpgroup == kConsumers) {
    give_registers<Config::kScalesInStages ? kScaleProducerRegisters : kProducerRegisters>();
    if (threadIdx.x / kWarpSize == kConsumerWarps && elect_one()) produce(shared, &map_a, &map_b, p);
    if constexpr (Config::kScalesInStages) {
      if (threadIdx.x / kWarpSize == kConsumerWarps + 1) produce_scales<Config, true>(shared, p);
      if (threadIdx.x / kWarpSize == kConsumerWarps + 2) produce_scales<Config, false>(shared, p);
    }
  } else {
    take_registers<Config::kScalesInStages ? kScaledConsumerRegisters : kConsumerRegisters>();
    consume(shared, &map_out, p, warpgroup);
  }
}

}  // namespace k25::cuda
