"""pool_temporal_patches against its reference, transformers, and everything that torch asks of an op."""

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import DTYPES, PatchCase, first_difference, patch_cases, relative_error, tolerance

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]
K25_CLIPS = ((4, 16, 24), (1, 6, 8), (3, 10, 4), (2, 2, 2), (1, 2, 40))
# Rows of K2.5's 1152 channels and their like, in more runs than threads take at a time.
LARGE = [
    PatchCase(clips=((2, 32, 18), (1, 30, 8), (3, 10, 4)), merge=(2, 2), dim=d, dtype=t, grid_dtype=torch.int64, seed=3)
    for t, d in ((torch.bfloat16, 1152), (torch.float32, 576), (torch.float64, 248), (torch.bfloat16, 1151))
]


def values_and_gradient(function, case: PatchCase, *, dtype: torch.dtype | None = None, shift: int = 0) -> list[Tensor]:
    """The result and the gradient of x. `shift` moves x and the upstream gradient off an aligned address."""
    x_PD, grid_thw_N3, grad_QCD = case.tensors()

    def place(value: Tensor) -> Tensor:
        space = torch.empty(value.numel() + shift, dtype=dtype or case.dtype)
        return space[shift:].view(value.shape).copy_(value)

    x_PD = place(x_PD).requires_grad_()
    y_QCD = function(x_PD, grid_thw_N3, case.merge)
    return [y_QCD.detach(), *torch.autograd.grad(y_QCD, x_PD, place(grad_QCD))]


def check_against_reference(case: PatchCase, ours: list[Tensor]) -> None:
    """Raises unless value and gradient are the float64 reference's to within the dtype, and of its shapes."""
    exact = values_and_gradient(ops.reference_pool_temporal_patches, case, dtype=torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == case.dtype
        assert relative_error(a, b) <= tolerance(case.dtype)
        # One rounding: no element is further from the exact mean than half a unit of its last place, give or take the
        # float32 sum.
        unit = 2.0**-8 if case.dtype == torch.bfloat16 else tolerance(case.dtype)
        near = (a.double() - b).abs() <= b.abs() * unit * 1.01 + 1e-6
        assert near.all()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60)
@given(case=patch_cases(), shift=st.sampled_from((0, 0, 1, 3)))
def test_value_and_gradient(isa: str, case: PatchCase, shift: int) -> None:
    native._C.cpu.set_isa(isa)
    try:
        ours = values_and_gradient(ops.pool_temporal_patches, case, shift=shift)
    finally:
        native._C.cpu.set_isa("auto")
    check_against_reference(case, ours)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("case", "shift"), [*((case, 0) for case in LARGE), (LARGE[0], 1)])
def test_long_rows(isa: str, case: PatchCase, shift: int) -> None:
    native._C.cpu.set_isa(isa)
    try:
        ours = values_and_gradient(ops.pool_temporal_patches, case, shift=shift)
    finally:
        native._C.cpu.set_isa("auto")
    expected = values_and_gradient(ops.reference_pool_temporal_patches, case)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(case.dtype), atol=0)
        # Sums of so few bf16 numbers are exact in float32: only the one rounding is left to differ.
        assert case.dtype != torch.bfloat16 or not first_difference(a, b)


@settings(max_examples=60)
@given(case=patch_cases())
@example(case=LARGE[0])
@example(case=LARGE[1])
def test_one_thread_and_two_agree_bitwise(case: PatchCase) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(values_and_gradient(ops.pool_temporal_patches, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert [first_difference(a, b) for a, b in zip(results[0], other, strict=True)] == ["", ""]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through_the_mean(isa: str, dtype: torch.dtype) -> None:
    """NaN, infinities, signed zeros and numbers that bf16 rounds up to infinity."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 3.3895313892515355e38, 1e-39])
    x_PD = special.repeat(12, 10).roll(1, 0).to(dtype)
    x_PD[8:] = x_PD[8:].flip(1)
    grid_thw_N3 = torch.tensor([[1, 2, 2], [2, 2, 2]])
    native._C.cpu.set_isa(isa)
    try:
        y_QCD = ops.pool_temporal_patches(x_PD, grid_thw_N3)
    finally:
        native._C.cpu.set_isa("auto")
    torch.testing.assert_close(
        y_QCD, ops.reference_pool_temporal_patches(x_PD, grid_thw_N3), rtol=0, atol=0, equal_nan=True
    )


def test_gradcheck() -> None:
    for merge, clips in (((2, 2), ((3, 2, 4), (1, 2, 2))), ((1, 3), ((2, 2, 3),))):
        case = PatchCase(clips=clips, merge=merge, dim=3, dtype=torch.float64, grid_dtype=torch.int64, seed=2)
        x_PD, grid_thw_N3, _ = case.tensors()
        x_PD.requires_grad_()
        assert torch.autograd.gradcheck(lambda x, g=grid_thw_N3, m=merge: ops.pool_temporal_patches(x, g, m), (x_PD,))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x_PD = torch.randn(8, 3, requires_grad=True)
    y_QCD = ops.pool_temporal_patches(x_PD, torch.tensor([[2, 2, 2]]))
    (grad,) = torch.autograd.grad(y_QCD.square().sum(), x_PD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    case = PatchCase(clips=((3, 2, 4), (1, 4, 2)), merge=(2, 2), dim=5, dtype=dtype, grid_dtype=torch.int32, seed=1)
    x_PD, grid_thw_N3, grad_QCD = case.tensors()
    forward, backward = torch.ops.k25.pool_temporal_patches, torch.ops.k25.pool_temporal_patches_backward
    torch.library.opcheck(forward.default, (x_PD.clone().requires_grad_(), grid_thw_N3, [2, 2]))
    torch.library.opcheck(backward.default, (grad_QCD, grid_thw_N3, case.num_patches, [2, 2]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    """The grid is an input of the graph: other clips, and another number of them, give other sizes."""
    projector_DV = torch.randn(24, 5)

    def project(x_PD: Tensor, grid_thw_N3: Tensor) -> Tensor:
        return (ops.pool_temporal_patches(x_PD * 2, grid_thw_N3).flatten(1) @ projector_DV).tanh()

    compiled = torch.compile(project, fullgraph=True, backend=backend, dynamic=dynamic)
    for clips in (((1, 4, 4), (2, 2, 2)), ((4, 2, 2), (1, 2, 2)), ((2, 4, 6), (1, 2, 2), (3, 2, 4)), ((1, 2, 2),)):
        case = PatchCase(clips=clips, merge=(2, 2), dim=6, dtype=torch.float32, grid_dtype=torch.int64, seed=4)
        x_PD, grid_thw_N3, _ = case.tensors()
        results = []
        for function in (project, compiled):
            x = x_PD.clone().requires_grad_()
            y = function(x, grid_thw_N3)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_the_same(dtype: torch.dtype) -> None:
    name = "transformers.models.kimi_k25.modeling_kimi_k25"
    modeling = pytest.importorskip(name, reason="transformers with Kimi-K2.5 (5.18 or newer) is not installed")

    class Merger:
        merge_kernel_size = (2, 2)

    case = PatchCase(clips=K25_CLIPS, merge=(2, 2), dim=36, dtype=dtype, grid_dtype=torch.int64, seed=5)
    x_PD, grid_thw_N3, _ = case.tensors()
    theirs = modeling.Kimi_K25VisionModel.temporal_patch_merger(Merger(), x_PD, grid_thw_N3)
    ours = ops.pool_temporal_patches(x_PD, grid_thw_N3)
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) <= tolerance(dtype)


def test_no_clips_and_empty_rows() -> None:
    no_clips = torch.empty(0, 3, dtype=torch.int64)
    assert ops.pool_temporal_patches(torch.empty(0, 6), no_clips).shape == (0, 4, 6)
    assert ops.pool_temporal_patches(torch.empty(8, 0), torch.tensor([[2, 2, 2]])).shape == (1, 4, 0)
    x_PD = torch.empty(0, 6, requires_grad=True)
    assert torch.autograd.grad(ops.pool_temporal_patches(x_PD, no_clips).sum(), x_PD)[0].shape == (0, 6)


def test_other_layouts_devices_and_modes() -> None:
    x_PD, grid_thw_N3 = torch.randn(6, 32).T, torch.tensor([[2, 3], [2, 4], [2, 2]]).T
    assert not x_PD.is_contiguous()
    expected = ops.reference_pool_temporal_patches(x_PD, grid_thw_N3)
    assert not first_difference(
        ops.pool_temporal_patches(x_PD, grid_thw_N3), ops.pool_temporal_patches(x_PD.contiguous(), grid_thw_N3.int())
    )
    torch.testing.assert_close(ops.pool_temporal_patches(x_PD, grid_thw_N3, [2, 2]), expected)
    meta = ops.pool_temporal_patches(x_PD.to("meta"), grid_thw_N3)
    assert meta.device.type == "meta"
    assert meta.shape == expected.shape
    leaf = x_PD.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ops.pool_temporal_patches(leaf, grid_thw_N3).sum(), leaf)  # a gradient of stride 0
    assert torch.equal(grad[:, 0], torch.tensor([1 / 2] * 8 + [1 / 3] * 24))


GRID = [[1, 2, 2], [2, 4, 2]]
BAD_GRIDS = [
    ([[1, 2, 2], [2, 3, 2]], "grid_thw_N3[1, 1] (h): got 3, accepted a positive multiple of 2 (merge[0])"),
    ([[1, 2, 2], [2, 4, 1]], "grid_thw_N3[1, 2] (w): got 1, accepted a positive multiple of 2 (merge[1])"),
    ([[0, 2, 2], [2, 4, 2]], "grid_thw_N3[0, 0] (t): got 0, accepted 1 or more"),
    ([[1, 2, 2], [-2, 4, -2]], "grid_thw_N3[1, 0] (t): got -2, accepted 1 or more"),
    ([[1, 2, 2], [2, 0, 2]], "grid_thw_N3[1, 1] (h): got 0, accepted a positive multiple of 2 (merge[0])"),
    ([[1, 2, 2], [2, 4, -4]], "grid_thw_N3[1, 2] (w): got -4, accepted a positive multiple of 2 (merge[1])"),
    ([[1, 2, 2], [1, 4, 2]], "grid_thw_N3: got clips of 12 patches in all, accepted 20, the rows of x_PD"),
    ([[1, 2, 2], [3, 4, 2]], "grid_thw_N3[1]: got 3 x 4 x 2 patches after 4, accepted at most 16 more: x_PD has 20"),
    ([[2**62, 2**62, 2], [1, 2, 2]], "grid_thw_N3[0]: got 4611686018427387904 x 4611686018427387904 x 2 patches"),
    ([[2**62, 2, 2], [1, 2, 2]], "grid_thw_N3[0]: got 4611686018427387904 x 2 x 2 patches"),
    ([[1, 2**32, 2**32], [1, 2, 2]], "grid_thw_N3[0]: got 1 x 4294967296 x 4294967296 patches"),
    ([[1, 2, 2]] * 21, "grid_thw_N3: got 21 clips, accepted at most 20, the rows of x_PD"),
    ([1, 2, 2], "grid_thw_N3: got shape (3,), accepted (N, 3=3)"),
    ([[1.0, 2.0, 2.0]], "grid_thw_N3: got dtype torch.float32, accepted int32 or int64"),
]


@pytest.mark.parametrize(("grid", "text"), BAD_GRIDS)
def test_a_bad_grid_is_refused(grid: list, text: str) -> None:
    x_PD = torch.randn(20, 3)
    assert ops.pool_temporal_patches(x_PD, torch.tensor(GRID)).shape == (3, 4, 3)
    with pytest.raises((TypeError, ValueError), match=r"^pool_temporal_patches: " + re.escape(text)):
        ops.pool_temporal_patches(x_PD, torch.tensor(grid))
    with pytest.raises((TypeError, ValueError), match=r"^pool_temporal_patches: " + re.escape(text)):
        ops.pool_temporal_patches(x_PD.to("meta"), torch.tensor(grid))


def test_other_bad_arguments_are_refused() -> None:
    x_PD, grid_thw_N3 = torch.randn(20, 3), torch.tensor(GRID)
    calls: list[tuple[tuple[Any, ...], str]] = [
        ((x_PD, grid_thw_N3, 2), "merge: got int 2, accepted a pair of ints"),
        ((x_PD, grid_thw_N3, (2, 2, 2)), "merge: got tuple (2, 2, 2), accepted a pair of ints"),
        ((x_PD, grid_thw_N3, (2, 0)), "merge[1]: got 0, accepted 1 to 1024"),
        ((x_PD, grid_thw_N3, (2.0, 2)), "merge[0]: got float 2.0, accepted an int"),
        ((x_PD.half(), grid_thw_N3), "x_PD: got dtype torch.float16"),
        ((x_PD[0], grid_thw_N3), "x_PD: got shape (3,), accepted (P, D)"),
        ((x_PD, GRID), "grid_thw_N3: got list, accepted a torch.Tensor"),
        ((x_PD, grid_thw_N3.to("meta")), "grid_thw_N3: got device meta, accepted cpu"),
    ]
    for arguments, text in calls:
        with pytest.raises((TypeError, ValueError), match=r"^pool_temporal_patches: " + re.escape(text)):
            ops.pool_temporal_patches(*arguments)


def test_a_gradient_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grad_QCD: got shape \(2, 4, 3\), accepted \(Q=3"):
        torch.ops.k25.pool_temporal_patches_backward(torch.randn(2, 4, 3), torch.tensor(GRID), 20, [2, 2])
