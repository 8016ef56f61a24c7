"""Bugs that the executor must catch: each a substitution in a copy of csrc. All but those of the matrix products."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.cuda_on_cpu.build import CSRC

Sort = Literal[
    "swizzle", "stride", "K step", "wait", "phase", "fence", "barrier", "tile", "scale", "reduction", "collective",
    "bounds", "index",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlantedBug:
    """`old` becomes `new` in csrc/`file`; `caught_as` is what the PTX executor's error says, "" for a wrong result.

    `kernel` is the one that shows it.
    """

    name: str
    sort: Sort
    kernel: str
    file: str
    old: str
    new: str
    caught_as: str

    def plant(self, folder: Path) -> Path:
        """A copy of csrc in `folder` with the bug. Raises ValueError unless `old` occurs exactly once."""
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        text = (copy / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}")
        (copy / self.file).write_text(text.replace(self.old, self.new))
        return copy


DROPPED_BARRIER = PlantedBug(
    name="no __syncthreads between zeroing and counting",
    sort="barrier",
    kernel="count_slots_kernel",
    file="plan_dispatch/kernels.cuh",
    old="counts[e] = 0;\n  __syncthreads();",
    new="counts[e] = 0;",
    caught_as="race at byte",
)
STORE_TOO_FAR = PlantedBug(
    name="vector store past the end of the row",
    sort="bounds",
    kernel="combine_kernel",
    file="dispatch/kernels.cuh",
    old="for (; d < p.dim; d += step) {",
    new="for (; d <= p.dim; d += step) {",
    caught_as="out of bounds|race at byte",
)
PLANTED_BUGS = (
    DROPPED_BARRIER,
    STORE_TOO_FAR,
    PlantedBug(
        name="no __syncwarp between reading and advancing the next row",
        sort="barrier",
        kernel="place_slots_kernel",
        file="plan_dispatch/kernels.cuh",
        old="    __syncwarp();\n    if (exists && rank == 0)",
        new="    if (exists && rank == 0)",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="shuffle mask of half a warp",
        sort="collective",
        kernel="combine_backward_kernel",
        file="common/device.cuh",
        old="value += __shfl_xor_sync(kAllLanes, value, distance);",
        new="value += __shfl_xor_sync(0xffffu, value, distance);",
        caught_as="shfl.sync.bfly.*not in (its|the) mask",
    ),
    PlantedBug(
        name="shuffle that some lanes skip",
        sort="collective",
        kernel="scan_blocks_kernel",
        file="plan_dispatch/kernels.cuh",
        old="const int32_t before = __shfl_up_sync(kAllLanes, value, distance);\n"
        "    if (lane >= distance) value += before;",
        new="if (lane >= distance) value += __shfl_up_sync(kAllLanes, value, distance);",
        caught_as="while other lanes of the warp wait at|deadlock",
    ),
    PlantedBug(
        name="barrier inside divergent code",
        sort="collective",
        kernel="place_slots_kernel",
        file="plan_dispatch/kernels.cuh",
        old="if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;\n  __syncthreads();",
        new="if (lane == kWarpSize - 1) {\n    warp_sums[warp] = inclusive;\n    __syncthreads();\n  }",
        caught_as="deadlock|race at byte",
    ),
    PlantedBug(
        name="warp reduction that stops one step early",
        sort="reduction",
        kernel="route_tokens_backward_kernel",
        file="common/device.cuh",
        old="  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {\n    value +=",
        new="  for (int distance = kWarpSize / 2; distance > 1; distance /= 2) {\n    value +=",
        caught_as="",
    ),
    PlantedBug(
        name="off by one in the unrolled copy",
        sort="bounds",
        kernel="dispatch_kernel",
        file="dispatch/kernels.cuh",
        old="i + (kInFlight - 1) * kWarpSize < units_per_row",
        new="i + (kInFlight - 1) * kWarpSize <= units_per_row",
        caught_as="out of bounds|race at byte",
    ),
    PlantedBug(
        name="no tail of the copy",
        sort="tile",
        kernel="dispatch_kernel",
        file="dispatch/kernels.cuh",
        old="for (; i < units_per_row; i += kWarpSize) store_unit(to + i, __ldg(from + i));",
        new="",
        caught_as="",
    ),
    PlantedBug(
        name="16-byte path without a look at the address",
        sort="bounds",
        kernel="combine_kernel",
        file="dispatch/cuda.cu",
        old="whole_words(p.dim, p.dtype) && aligned16(p.rows, p.out)",
        new="whole_words(p.dim, p.dtype)",
        caught_as="misaligned",
    ),
    PlantedBug(
        name="two warps write one row",
        sort="index",
        kernel="combine_backward_kernel",
        file="dispatch/kernels.cuh",
        old="const Element* row = static_cast<const Element*>(p.rows) + m * p.dim;\n"
        "  Element* grad_row = static_cast<Element*>(p.grad_rows) + m * p.dim;",
        new="const Element* row = static_cast<const Element*>(p.rows) + m * p.dim;\n"
        "  Element* grad_row = static_cast<Element*>(p.grad_rows) + m / 2 * p.dim;",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="shared memory read before it is written",
        sort="index",
        kernel="route_tokens_backward_kernel",
        file="route_tokens/kernels.cuh",
        old="e += kWarpSize) row[e] = 0;",
        new="e += 2 * kWarpSize) row[e] = 0;",
        caught_as="",
    ),
    PlantedBug(
        name="sums of a warp joined without their maxima",
        sort="reduction",
        kernel="loss_rows_kernel",
        file="policy_loss/kernels.cuh",
        old="const S theirs = other_max > S(-1e30) ? natural_exp(other_max - top) : S(0);",
        new="const S theirs = S(1);",
        caught_as="",
    ),
    PlantedBug(
        name="row sums of one warp too few",
        sort="reduction",
        kernel="loss_rows_kernel",
        file="policy_loss/kernels.cuh",
        old="lane < kRowWarps ? shared[lane]",
        new="lane < kRowWarps - 1 ? shared[lane]",
        caught_as="",
    ),
    PlantedBug(
        name="no barrier before the warps' sums are read",
        sort="reduction",
        kernel="loss_rows_kernel",
        file="policy_loss/kernels.cuh",
        old="if (lane == 0) shared[warp] = mine;\n  __syncthreads();",
        new="if (lane == 0) shared[warp] = mine;",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="target off by one in the gradient",
        sort="index",
        kernel="logit_grad_kernel",
        file="policy_loss/kernels.cuh",
        old="slope * (S(i + j == target)",
        new="slope * (S(i + j + 1 == target)",
        caught_as="",
    ),
    PlantedBug(
        name="target's logit read after it may be overwritten",
        sort="barrier",
        kernel="loss_rows_kernel",
        file="policy_loss/kernels.cuh",
        old="    logprob = at_target - log_sum;\n",
        new="    Element* out = static_cast<Element*>(p.grad_logits) + t * p.vocab;\n"
        "    write_grad<Element, kVectorized>(row, out, p.vocab, target, log_sum, S(1));\n"
        "    logprob = logit_at(row, target, p.vocab) - log_sum;\n",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="a frame taken for a row of patches",
        sort="stride",
        kernel="pool_temporal_patches_kernel",
        file="pool_temporal_patches/kernels.cuh",
        old="patches * p.dim, clip.frames}",
        new="clip.width * p.dim, clip.frames}",
        caught_as="",
    ),
    PlantedBug(
        name="a clip's first neighbourhood given to the clip before it",
        sort="index",
        kernel="pool_temporal_patches_backward_kernel",
        file="pool_temporal_patches/kernels.cuh",
        old="if (__ldg(&clips[middle].first_out) <= out)",
        new="if (__ldg(&clips[middle].first_out) < out)",
        caught_as="trap",
    ),
    PlantedBug(
        name="no last part of a pooled run",
        sort="tile",
        kernel="pool_temporal_patches_kernel",
        file="pool_temporal_patches/kernels.cuh",
        old="Element* to = static_cast<Element*>(p.out) + run * length;\n"
        "  for (int64_t i = threadIdx.x % kWarpSize * kCount; i < length;",
        new="Element* to = static_cast<Element*>(p.out) + run * length;\n"
        "  for (int64_t i = threadIdx.x % kWarpSize * kCount; i + kWarpSize * kCount <= length;",
        caught_as="",
    ),
    PlantedBug(
        name="no barrier between filling the tile and reading it",
        sort="barrier",
        kernel="quantize_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="    load_tile<Element, kVectorized>(p, at, tile);\n    __syncthreads();",
        new="    load_tile<Element, kVectorized>(p, at, tile);",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="scale of the row beside",
        sort="scale",
        kernel="quantize_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="p.scales[line * col_tiles + t] = scale;",
        new="p.scales[(line ^ 1) * col_tiles + t] = scale;",
        caught_as="",
    ),
    PlantedBug(
        name="columns read along rows",
        sort="stride",
        kernel="quantize_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="scale_of(load_line(tile + col, kTileStride, values), p.power_of_two)",
        new="scale_of(load_line(tile + col, kTileStride - 1, values), p.power_of_two)",
        caught_as="",
    ),
    PlantedBug(
        name="counted without an atomic",
        sort="reduction",
        kernel="count_slots_kernel",
        file="plan_dispatch/kernels.cuh",
        old="atomicAdd(counts + id, 1);",
        new="counts[id] += 1;",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="block's own slots counted as those before it",
        sort="index",
        kernel="scan_blocks_kernel",
        file="plan_dispatch/kernels.cuh",
        old="counts[b] = carried + inclusive - count;",
        new="counts[b] = carried + inclusive;",
        caught_as="",
    ),
    PlantedBug(
        name="lane counts itself among those before it",
        sort="index",
        kernel="place_slots_kernel",
        file="plan_dispatch/kernels.cuh",
        old="same & ((1u << lane) - 1)",
        new="same & ((2u << lane) - 1)",
        caught_as="",
    ),
    PlantedBug(
        name="lanes take different experts of the same score",
        sort="reduction",
        kernel="route_tokens_kernel",
        file="route_tokens/kernels.cuh",
        old="    first = __reduce_min_sync(kAllLanes, first);\n",
        new="",
        caught_as="",
    ),
    PlantedBug(
        name="expert taken twice",
        sort="index",
        kernel="route_tokens_kernel",
        file="route_tokens/kernels.cuh",
        old="keys[i][j] = expert(i, j) == first ? Key(kTaken) : keys[i][j];",
        new="keys[i][j] = expert(i, j) + 1 == first ? Key(kTaken) : keys[i][j];",
        caught_as="",
    ),
    PlantedBug(
        name="weights of the first token for all of them",
        sort="scale",
        kernel="combine_kernel",
        file="dispatch/kernels.cuh",
        old="__ldg(static_cast<const Scalar*>(p.weights) + first_slot + k)",
        new="__ldg(static_cast<const Scalar*>(p.weights) + k)",
        caught_as="",
    ),
    PlantedBug(
        name="every block starts at the row's first column",
        sort="tile",
        kernel="swiglu_kernel",
        file="swiglu/kernels.cuh",
        old="(int64_t(blockIdx.y) * kSwigluThreads + threadIdx.x) * kCount;\n"
        "  for (; i < p.width; i += step) {\n    Scalar gates[kCount], ups[kCount];",
        new="threadIdx.x * kCount;\n  for (; i < p.width; i += step) {\n    Scalar gates[kCount], ups[kCount];",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="gradient of up over that of gate",
        sort="stride",
        kernel="swiglu_backward_kernel",
        file="swiglu/kernels.cuh",
        old="store(grad_row + p.width + i, ups);\n  }\n}",
        new="store(grad_row + i, ups);\n  }\n}",
        caught_as="",
    ),
    PlantedBug(
        name="threads behind the last token",
        sort="bounds",
        kernel="token_losses_kernel",
        file="policy_loss/kernels.cuh",
        old="  if (t >= p.num_tokens) return;\n",
        new="",
        caught_as="out of bounds",
    ),
    PlantedBug(
        name="every thread writes the row's sums",
        sort="reduction",
        kernel="logit_stats_kernel",
        file="policy_loss/kernels.cuh",
        old="  if (threadIdx.x != 0) return;\n",
        new="",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="log-sum of the first row for all of them",
        sort="scale",
        kernel="logit_grad_kernel",
        file="policy_loss/kernels.cuh",
        old="static_cast<const S*>(p.log_sums)[t]",
        new="static_cast<const S*>(p.log_sums)[0]",
        caught_as="",
    ),
    PlantedBug(
        name="no barrier before the tile's largest value is read",
        sort="reduction",
        kernel="quantize_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="if (lane == 0) shared[warp] = largest;\n  __syncthreads();",
        new="if (lane == 0) shared[warp] = largest;",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="scale of the row's first tile for all of them",
        sort="scale",
        kernel="dequantize_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="scale_row * col_tiles + i / kFp8Tile",
        new="scale_row * col_tiles",
        caught_as="",
    ),
    PlantedBug(
        name="shares written over the first frame",
        sort="stride",
        kernel="pool_temporal_patches_backward_kernel",
        file="pool_temporal_patches/kernels.cuh",
        old="store(to + f * place.frame + i, shares);",
        new="store(to + i, shares);",
        caught_as="",
    ),
    PlantedBug(
        name="tile transposed before all of it is there",
        sort="barrier",
        kernel="transpose_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="    __syncthreads();\n    // Four rows of a word",
        new="    // Four rows of a word",
        caught_as="race at byte",
    ),
    PlantedBug(
        name="scale not transposed with its tile",
        sort="scale",
        kernel="transpose_fp8_kernel",
        file="fp8_quantize/kernels.cuh",
        old="p.scales_transposed[in_batch + t * row_tiles + row_tile]",
        new="p.scales_transposed[in_batch + row_tile * col_tiles + t]",
        caught_as="",
    ),
    PlantedBug(
        name="routing weight of the row's number, not of its slot",
        sort="scale",
        kernel="weighted_swiglu_grads_kernel",
        file="swiglu/kernels.cuh",
        old="static_cast<const Scalar*>(p.weights) + slot);",
        new="static_cast<const Scalar*>(p.weights) + m);",
        caught_as="",
    ),
    PlantedBug(
        name="gradient of the routing weight with the weight in it",
        sort="reduction",
        kernel="weighted_swiglu_grads_kernel",
        file="swiglu/kernels.cuh",
        old="dot = fma(grads[j], value, dot);",
        new="dot = fma(grads[j] * weight, value, dot);",
        caught_as="",
    ),
)
