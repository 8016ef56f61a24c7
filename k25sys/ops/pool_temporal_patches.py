"""Temporal pooling of MoonViT-3D: the mean over a clip's frames, patches regrouped into neighbourhoods."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, DeviceError, ShapeError, message
from k25sys.ops import checks, native

_OP_NAME = "pool_temporal_patches"
_MAX_MERGE = 1024
_CLIP_FIELDS = 5  # int64 fields of struct Clip in csrc/pool_temporal_patches/api.h


def reference_pool_temporal_patches(x_PD: Tensor, grid_thw_N3: Tensor, merge: Sequence[int] = (2, 2)) -> Tensor:
    """`pool_temporal_patches` in plain torch: averaged in float32 (float64) and rounded once."""
    merge_h, merge_w = merge
    dim = x_PD.shape[1]
    clips = grid_thw_N3.tolist()
    pooled = [x_PD[:0].reshape(0, merge_h * merge_w, dim)]
    for patches, (t, h, w) in zip(x_PD.split([t * h * w for t, h, w in clips]), clips, strict=True):
        mean = patches.to(checks.routing_dtype(x_PD.dtype)).view(t, h * w, dim).mean(0).to(x_PD.dtype)
        cells = mean.view(h // merge_h, merge_h, w // merge_w, merge_w, dim).transpose(1, 2)
        pooled.append(cells.reshape(h * w // (merge_h * merge_w), merge_h * merge_w, dim))
    return torch.cat(pooled)


def pool_temporal_patches(x_PD: Tensor, grid_thw_N3: Tensor, merge: Sequence[int] = (2, 2)) -> Tensor:
    """Averages each clip over its frames and groups the patches into neighbourhoods of merge[0] x merge[1].

    K2.5 report, section 2 (MoonViT-3D: temporal pooling of up to four frames before the projector). Clips of any
    number of frames and any size may be mixed; a picture is a clip of one frame.

    Args:
        x_PD: (P, D) float32, bfloat16 (averaged in float32, rounded once) or float64: the patches of all clips, clip
            by clip, frame by frame, each frame row-major.
        grid_thw_N3: (N, 3) int32 or int64: t >= 1, h and w in patches of each clip; h is a multiple of merge[0], w of
            merge[1], and the sum of t * h * w is P. The sizes are needed on the host: keep it on the CPU. One on a
            CUDA device is accepted, and copied to the host at each call, which waits for the device.
        merge: height and width of a neighbourhood.

    Returns:
        y_QCD (sum of h * w / C, C = merge[0] * merge[1], D), neighbourhoods row-major in their clip, patches row-major
        in their neighbourhood. Differentiable once in x: each frame gets 1 / t of the gradient. In a compiled graph
        the first size is a number that is known when the graph runs.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, device or number; a grid that does not describe the P rows.
    """
    if isinstance(grid_thw_N3, Tensor) and grid_thw_N3.device.type == "cuda":
        grid_thw_N3 = grid_thw_N3.cpu()
    return _OP(x_PD, grid_thw_N3, _merge_sizes(merge))


def _merge_sizes(merge: Any) -> list[int]:
    if not isinstance(merge, (tuple, list)) or len(merge) != 2:
        raise ArgumentTypeError(message(_OP_NAME, "merge", f"{type(merge).__name__} {merge!r}", "a pair of ints"))
    for i, size in enumerate(merge):
        checks.integer(_OP_NAME, f"merge[{i}]", size, 1, _MAX_MERGE)
    return list(merge)


def _check_grid(grid: Tensor, num_patches: int, merge: Sequence[int]) -> None:
    _merge_sizes(merge)
    checks.tensor(_OP_NAME, "grid_thw_N3", grid, (torch.int32, torch.int64), (None, 3), "N3")
    if grid.device.type != "cpu":
        hint = "its sizes are needed on the host: move it with .cpu()"
        raise DeviceError(message(_OP_NAME, "grid_thw_N3", f"device {grid.device}", "cpu", hint))
    if grid.shape[0] > num_patches:
        raise ShapeError(
            message(_OP_NAME, "grid_thw_N3", f"{grid.shape[0]} clips", f"at most {num_patches}, the rows of x_PD")
        )


def _check(x: Tensor, grid: Tensor, merge: Sequence[int]) -> None:
    checks.tensor(_OP_NAME, "x_PD", x, checks.FLOATS, (None, None), "PD")
    checks.same_device(_OP_NAME, "x_PD", x, {})
    checks.row_count(_OP_NAME, "x_PD", x.shape[0], 1)
    _check_grid(grid, x.shape[0], merge)


def _clip_table(grid: Tensor, num_patches: int, merge: Sequence[int]) -> tuple[Tensor, int]:
    """The kernels' table of clips, and the number of neighbourhoods. Raises ValueError for a wrong grid."""
    grid = grid.contiguous()
    table = torch.empty((grid.shape[0], _CLIP_FIELDS), dtype=torch.int64)
    is_int64 = grid.dtype == torch.int64
    num_out = native._C.cpu.clip_table(grid.data_ptr(), is_int64, grid.shape[0], num_patches, *merge, table.data_ptr())
    return table, num_out


def _fake(x: Tensor, grid: Tensor, merge: Sequence[int]) -> Tensor:
    _check(x, grid, merge)
    if isinstance(grid, FakeTensor):
        num_out = torch.library.get_ctx().new_dynamic_size()
    else:
        _, num_out = _clip_table(grid, x.shape[0], merge)
    return x.new_empty((num_out, merge[0] * merge[1], x.shape[1]))


def _kernel(x: Tensor, grid: Tensor, merge: Sequence[int]) -> Tensor:
    _check(x, grid, merge)
    num_patches, dim = x.shape
    table, num_out = _clip_table(grid, num_patches, merge)
    out = native.empty((num_out, merge[0] * merge[1], dim), x)
    x, table = x.contiguous(), table.to(x.device)
    native.kernels(_OP_NAME, x.device).pool_temporal_patches(
        x.data_ptr(), table.data_ptr(), out.data_ptr(), table.shape[0], num_patches, num_out, dim, *merge,
        native.DTYPE_CODES[x.dtype], native.where(x.device),
    )  # fmt: skip
    return out


def _backward_check(grad: Tensor, grid: Tensor, num_patches: int, merge: Sequence[int]) -> None:
    op, cells = "pool_temporal_patches_backward", merge[0] * merge[1]
    checks.tensor(op, "grad_QCD", grad, checks.FLOATS, (None, cells, None), "QCD")
    checks.same_device(op, "grad_QCD", grad, {})
    checks.integer(op, "num_patches", num_patches, 0, checks.MAX_ROWS)
    _check_grid(grid, num_patches, merge)


def _backward_fake(grad: Tensor, grid: Tensor, num_patches: int, merge: Sequence[int]) -> Tensor:
    _backward_check(grad, grid, num_patches, merge)
    return grad.new_empty((num_patches, grad.shape[2]))


def _backward_kernel(grad: Tensor, grid: Tensor, num_patches: int, merge: Sequence[int]) -> Tensor:
    _backward_check(grad, grid, num_patches, merge)
    table, num_out = _clip_table(grid, num_patches, merge)
    checks.tensor("pool_temporal_patches_backward", "grad_QCD", grad, checks.FLOATS, (num_out, *grad.shape[1:]), "QCD")
    grad_x = native.empty((num_patches, grad.shape[2]), grad)
    grad, table = grad.contiguous(), table.to(grad.device)
    native.kernels(_OP_NAME, grad.device).pool_temporal_patches_backward(
        grad.data_ptr(), table.data_ptr(), grad_x.data_ptr(), table.shape[0], num_patches, num_out, grad.shape[2],
        *merge, native.DTYPE_CODES[grad.dtype], native.where(grad.device),
    )  # fmt: skip
    return grad_x


class _PoolTemporalPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, merge: Sequence[int]) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.num_patches, ctx.merge = x.shape[0], merge
        return _OP.below_autograd(x, grid, merge)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _BACKWARD(grad, *ctx.saved_tensors, ctx.num_patches, ctx.merge), None, None


def _autograd(x: Tensor, grid: Tensor, merge: Sequence[int]) -> Tensor:
    if native.wants_grad(x):
        return _PoolTemporalPatches.apply(x, grid, merge)
    return _OP.below_autograd(x, grid, merge)


_OP = native.define(
    "pool_temporal_patches(Tensor x_PD, Tensor grid_thw_N3, int[] merge) -> Tensor", _kernel, _fake, _autograd
)
_BACKWARD = native.define(
    "pool_temporal_patches_backward(Tensor grad_QCD, Tensor grid_thw_N3, SymInt num_patches, int[] merge) -> Tensor",
    _backward_kernel,
    _backward_fake,
)
