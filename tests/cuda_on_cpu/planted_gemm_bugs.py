"""Bugs in the matrix products that the executor must catch."""

from dataclasses import dataclass

from tests.cuda_on_cpu.planted_bugs import PlantedBug

KERNELS, WRAPPERS = "gemm/kernels.cuh", "common/hopper.cuh"
LOAD_RACE = "race at byte .*a bulk copy to shared memory"

# Kinds of small_gemm.cu; ADDED are weight gradients that are added to the result.
BF16, TRANSPOSED, FP8, WEIGHT_GRADS, FP8_WEIGHT_GRADS, ADDED = range(6)
MULTIPLY = "    if constexpr (Config::kWeightGrads) {\n      const int left"  # the first statement behind the wait
WAIT = "    wait_for_phase(shared.full() + ring.stage, ring.parity);\n"


@dataclass(frozen=True, kw_only=True)
class PlantedGemmBug(PlantedBug):
    """`kind` is the kernel that shows it."""

    kind: int = BF16


PLANTED_GEMM_BUGS = (
    PlantedGemmBug(
        name="descriptor with 64-byte swizzle",
        file=WRAPPERS,
        old="kSwizzle128 = 1ull << 62",
        new="kSwizzle128 = 2ull << 62",
        caught_as="",
    ),
    PlantedGemmBug(
        name="stride of 4 rows in the descriptor",
        file=WRAPPERS,
        old="uint64_t(stride >> 4) << 32",
        new="uint64_t(stride >> 5) << 32",
        caught_as="",
    ),
    PlantedGemmBug(
        name="half a step along K",
        file=KERNELS,
        old="a + descriptor_step(i * kStepA)",
        new="a + descriptor_step(i * kStepA / 2)",
        caught_as="",
    ),
    PlantedGemmBug(
        name="MN-major tile with the stride of a K-major one",
        kind=TRANSPOSED,
        file=KERNELS,
        old="Config::kMnMajorB ? Config::kBoxBytes : 0",
        new="Config::kMnMajorB ? kSwizzleRepeat : 0",
        caught_as="",
    ),
    PlantedGemmBug(
        name="no wait for the loads",
        file=KERNELS,
        old=WAIT + MULTIPLY,
        new=MULTIPLY,
        caught_as=LOAD_RACE,
    ),
    PlantedGemmBug(
        name="loads waited for by the wrong phase",
        file=KERNELS,
        old=WAIT + MULTIPLY,
        new=WAIT.replace("ring.parity", "ring.parity ^ 1") + MULTIPLY,
        caught_as=LOAD_RACE,
    ),
    PlantedGemmBug(
        name="free stages waited for by the wrong phase",
        file=KERNELS,
        old="ring.parity ^ 1);\n      load_stage",
        new="ring.parity);\n      load_stage",
        caught_as="deadlock.*mbarrier.try_wait",
    ),
    PlantedGemmBug(
        name="sums read before their wgmma is waited for",
        kind=FP8,
        file=KERNELS,
        old="    wgmma_wait<0>();\n    hold_accumulators(products);\n    free_stage",
        new="    wgmma_wait<1>();\n    hold_accumulators(products);\n    free_stage",
        caught_as="",
    ),
    PlantedGemmBug(
        name="stage freed while its wgmma is in flight",
        file=KERNELS,
        old="if (k > 0) free_stage(shared, previous);\n    previous = ring.stage;",
        new="previous = ring.stage;\n    if (k > 0) free_stage(shared, previous);",
        caught_as="race at byte .* read by wgmma .* written by a bulk copy|deadlock",
    ),
    PlantedGemmBug(
        name="stage not freed",
        file=KERNELS,
        old="    if (k > 0) free_stage(shared, previous);\n",
        new="",
        caught_as="deadlock.*lacks .* arrivals",
    ),
    PlantedGemmBug(
        name="stage freed by one warp of eight",
        file=KERNELS,
        old="init_mbarrier(shared.empty() + i, kConsumerWarps)",
        new="init_mbarrier(shared.empty() + i, 1)",
        caught_as="race at byte .* read by wgmma .* written by a bulk copy|deadlock",
    ),
    PlantedGemmBug(
        name="stage freed by one consumer of two",
        file=KERNELS,
        old="init_mbarrier(shared.empty() + i, kConsumerWarps)",
        new="init_mbarrier(shared.empty() + i, kConsumerWarps / kConsumers)",
        caught_as="race at byte .* read by wgmma .* written by a bulk copy",
    ),
    PlantedGemmBug(
        name="expects the bytes of A alone",
        file=KERNELS,
        old="arrive_expecting(full, Config::kStageBytes)",
        new="arrive_expecting(full, Config::kBytesA)",
        caught_as="completes in phase 1, and was issued in phase 0|" + LOAD_RACE,
    ),
    PlantedGemmBug(
        name="no wgmma.fence",
        file=KERNELS,
        old="  wgmma_fence();\n",
        new="",
        caught_as="before any wgmma.fence",
    ),
    PlantedGemmBug(
        name="no fence of the mbarriers",
        file=KERNELS,
        old="    fence_mbarrier_init();\n",
        new="",
        caught_as="without a fence.mbarrier_init",
    ),
    PlantedGemmBug(
        name="no fence.proxy.async before the bulk store",
        file=KERNELS,
        old="    fence_async_proxy();\n    named_barrier(1 + consumer",
        new="    named_barrier(1 + consumer",
        caught_as="without a fence.proxy.async",
    ),
    PlantedGemmBug(
        name="no barrier before the bulk store",
        file=KERNELS,
        old="    fence_async_proxy();\n    named_barrier(1 + consumer, kWarpgroupSize);\n",
        new="    fence_async_proxy();\n",
        caught_as="race at byte .*a bulk store from shared memory",
    ),
    PlantedGemmBug(
        name="chunk written while a bulk store reads it",
        file=KERNELS,
        old="    if (leads) wait_for_stores_to_read<kChunkBuffers - 1>();\n",
        new="",
        caught_as="race at byte .* read by a bulk store from shared memory",
    ),
    PlantedGemmBug(
        name="end without a wait for the bulk stores",
        file=KERNELS,
        old="  if (threadIdx.x % kWarpgroupSize == 0) wait_for_stores_to_read<0>();\n",
        new="",
        caught_as="ended while bulk stores may still read shared memory",
    ),
    PlantedGemmBug(
        name="bulk store over the next expert's rows",
        file=KERNELS,
        old="const bool whole = tile.row + kTileM <= tile.end_of_expert || tile.end_of_expert == p.rows;",
        new="const bool whole = true;",
        caught_as="race at byte .* of out|^[^r]",
    ),
    PlantedGemmBug(
        name="no tile for an expert's last rows",
        file=KERNELS,
        old="count_ = (end_ - begin_ + kTileM - 1) / kTileM * column_tiles_;",
        new="count_ = (end_ - begin_) / kTileM * column_tiles_;",
        caught_as="",
    ),
    PlantedGemmBug(
        name="one row too many",
        file=KERNELS,
        old="if (row >= tile.end_of_expert || column >= p.columns) continue;",
        new="if (row > tile.end_of_expert || column >= p.columns) continue;",
        caught_as="",
    ),
    PlantedGemmBug(
        name="every expert multiplied by the first one's matrix",
        file=KERNELS,
        old="tile.expert * p.columns + tile.column",
        new="tile.column",
        caught_as="",
    ),
    PlantedGemmBug(
        name="scales of the tile's first columns for all of them",
        kind=FP8,
        file=KERNELS,
        old="min((tile.column + i * (Config::kTileN / kBlocks)) / kScaleBlock, scale_rows - 1)",
        new="min(tile.column / kScaleBlock, scale_rows - 1)",
        caught_as="",
    ),
    PlantedGemmBug(
        name="scales of the row above for the row below",
        kind=FP8,
        file=KERNELS,
        old="(i / 2 % 2 ? below : above)",
        new="above",
        caught_as="",
    ),
    PlantedGemmBug(
        name="more registers than an SM has",
        file=KERNELS,
        old="kConsumerRegisters = 232",
        new="kConsumerRegisters = 240",
        caught_as="take 66560 registers",
    ),
    PlantedGemmBug(
        name="rows of the next expert in its neighbour's weight gradients",
        kind=WEIGHT_GRADS,
        file=KERNELS,
        old="if (left < Config::kTileK) clear_rows_behind",
        new="if (left < 0) clear_rows_behind",
        caught_as="",
    ),
    PlantedGemmBug(
        name="cleared rows multiplied before all threads have cleared",
        kind=WEIGHT_GRADS,
        file=KERNELS,
        old="  named_barrier(1 + kConsumers, kConsumers * kWarpgroupSize);\n",
        new="",
        caught_as="race at byte .*wgmma|without a fence.proxy.async",
    ),
    PlantedGemmBug(
        name="cleared rows not fenced",
        kind=WEIGHT_GRADS,
        file=KERNELS,
        old="  fence_async_proxy();\n  named_barrier(1 + kConsumers",
        new="  named_barrier(1 + kConsumers",
        caught_as="without a fence.proxy.async",
    ),
    PlantedGemmBug(
        name="weight gradients of the wrong columns of A",
        kind=WEIGHT_GRADS,
        file=KERNELS,
        old="return tile.row - tile.expert * (p.rows / p.num_experts);",
        new="return tile.row;",
        caught_as="",
    ),
    PlantedGemmBug(
        name="scales of the next columns",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="shared.scales(ring.stage) + kTileM + first_column();",
        new="shared.scales(ring.stage) + kTileM + first_column() + 8;",
        caught_as="",
    ),
    PlantedGemmBug(
        name="an expert's scales from the start of the row",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old=" + tile.depth_start / kScaleBlock;",
        new=";",
        caught_as="",
    ),
    PlantedGemmBug(
        name="an empty expert's gradients not cleared",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="if (Config::kWeightGrads && p.accumulate && tile.depth_start == tile.depth_end) continue;",
        new="if (Config::kWeightGrads && tile.depth_start == tile.depth_end) continue;",
        caught_as="NaN where there is a result",
    ),
    PlantedGemmBug(
        name="stage freed before all lanes have read its scales",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="    __syncwarp();  // all lanes have read the scales\n",
        new="",
        caught_as="race at byte .* of shared memory",
    ),
    PlantedGemmBug(
        name="scales announced before all lanes have written them",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="      __syncwarp();\n      if (lane == 0) arrive(shared.full()",
        new="      if (lane == 0) arrive(shared.full()",
        caught_as="race at byte .* of shared memory",
    ),
    PlantedGemmBug(
        name="consumers do not wait for the scales of B",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="Config::kScalesInStages ? 3 : 1",
        new="Config::kScalesInStages ? 2 : 1",
        caught_as="race at byte|arrivals",
    ),
    PlantedGemmBug(
        name="scales gathered into a stage that is in use",
        kind=FP8_WEIGHT_GRADS,
        file=KERNELS,
        old="      wait_for_phase(shared.empty() + ring.stage, ring.parity ^ 1);\n      float* to",
        new="      float* to",
        caught_as="race at byte|arrivals",
    ),
    PlantedGemmBug(
        name="gradients overwritten that should be added to",
        kind=ADDED,
        file=KERNELS,
        old="if (Config::kWeightGrads && kF32 && p.accumulate) {",
        new="if (false) {",
        caught_as="",
    ),
    PlantedGemmBug(
        name="the last rows of an expert overwritten, not added to",
        kind=ADDED,
        file=KERNELS,
        old="const float low = adds ? value_at(to) + sums[i] : sums[i];",
        new="const float low = sums[i];",
        caught_as="",
    ),
)
