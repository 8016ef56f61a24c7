"""expert_mlp and the FP8 products as Python calls them on CUDA, with the executor in the device's place.

The op's own code allocates, checks and chooses; only k25sys._C.cuda is the executor. Tensors stay on the CPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from k25sys import ops
from k25sys.ops import checks, native
from tests.cuda_on_cpu import build
from tests.ops.generators import MoeCase, relative_error
from tests.ops.test_composed_experts import SMALL, check_fp8_store, check_layer, check_main_grads

pytestmark = pytest.mark.timeout(300)
RUNS = (("ptx", False, "in_order"), ("ptx", True, "random"), ("source", True, "reverse"))


class Device:
    """The kernels of the executor's modules. Tensors whose addresses were asked for since the last call are buffers."""

    def __init__(self, executor: str, lazy: bool, order: str) -> None:
        self._modules = (build.executor_module(), build.gemm_module())
        self._options = (order, 1, executor, lazy)
        self._buffers: dict[int, int] = {}
        self.calls: list[str] = []
        self._data_ptr = Tensor.data_ptr

    def data_ptr(self, value: Tensor) -> int:
        address = self._data_ptr(value)
        self._buffers[address] = max(value.nbytes, self._buffers.get(address, 0))
        return address

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for module in self._modules:
            if hasattr(module, name):
                return lambda *args: self._call(module, name, args)
        raise AttributeError(name)

    def _call(self, module: Any, name: str, args: tuple[Any, ...]) -> None:
        module.set_options(*self._options)
        module.clear_buffers()
        for i, (address, num_bytes) in enumerate(self._buffers.items()):
            module.register_buffer(f"tensor {i}", address, num_bytes, True)
        self._buffers = {}
        self.calls.append(name)
        getattr(module, name)(*args)


@pytest.fixture(params=RUNS, ids=str)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """In the place of every kernel; tensors of the CPU count as CUDA's."""
    device = Device(*request.param)
    monkeypatch.setattr(native, "kernels", lambda op, where: device)
    monkeypatch.setattr(checks, "on_cuda", lambda value: True)
    monkeypatch.setattr(Tensor, "data_ptr", lambda value: device.data_ptr(value))
    return device


def test_layer(device: Device) -> None:
    check_layer(SMALL)
    assert sorted(set(device.calls)) == [
        "combine", "dispatch", "grouped_gemm", "grouped_gemm_weight_grads", "swiglu", "weighted_swiglu_backward",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [{"num_tokens": 0}, {"num_tokens": 1, "top_k": 1}, {"num_experts": 9, "routing": "one_expert"}], ids=str
)
def test_layer_with_few_rows_and_empty_experts(device: Device, sizes: dict[str, Any]) -> None:
    check_layer(MoeCase(**{**SMALL.__dict__, **sizes}))


@pytest.mark.parametrize("buffer_dtype", [torch.bfloat16, torch.float32])
def test_main_grads(device: Device, buffer_dtype: torch.dtype) -> None:
    check_main_grads(buffer_dtype)


def test_fp8_store(device: Device) -> None:
    check_fp8_store()
    assert {"quantize_fp8", "dequantize_fp8"} <= set(device.calls)


def test_fp8_products(device: Device) -> None:
    """Forward, dgrad with a transpose on the device, and wgrad."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 128, 128, 144]).int()
    x, grad = (torch.randn(144, width, generator=generator) for width in (80, 48))
    weights = ops.quantize_fp8(torch.randn(3, 48, 80, generator=generator), (128, 128))
    rows, scales, rows_t, scales_t = ops.quantize_fp8_both_ways(x)
    grads = ops.quantize_fp8_both_ways(grad)
    for ours, exact in (
        (ops.fp8_grouped_gemm, ops.reference_fp8_grouped_gemm),
        (ops.fp8_grouped_gemm_wgrad, ops.reference_fp8_grouped_gemm_wgrad),
    ):
        calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = [((*grads[2:], rows_t, scales_t, offsets), {})]
        if ours is ops.fp8_grouped_gemm:
            calls = [((rows, scales, *weights, offsets), {}), ((*grads[:2], *weights, offsets), {"transpose_b": True})]
        for arguments, options in calls:
            result = ours(*arguments, **options, out_dtype=torch.float32)
            assert relative_error(result, exact(*arguments, **options, out_dtype=torch.float64)) <= 1e-5
    assert "transpose_fp8" in device.calls
    nothing = ops.quantize_fp8(torch.zeros(16, 0), (1, 128))
    assert ops.fp8_grouped_gemm_wgrad(*nothing, *nothing, torch.zeros(4).int()).eq(0).all()
    narrow = ops.quantize_fp8(torch.ones(8, 24), (1, 128))
    with pytest.raises(ValueError, match=r"fp8_grouped_gemm_wgrad: M \(columns of a_NM\): got 24, .* 16 on CUDA; pad"):
        ops.fp8_grouped_gemm_wgrad(*narrow, *narrow, torch.tensor([0, 24]).int())
