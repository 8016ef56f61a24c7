"""Small hand-written PTX kernels for tests of single instructions, and how to run them."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tests.cuda_on_cpu import build

HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 tiles[];\n"
SHARED_BYTES = 65536


@dataclass(frozen=True)
class Kernel:
    """PTX with the registers %p, %q (predicates), %r0 .. %r31 (%r0 is the thread), %f0 .. %f127, %d0 .. %d15.

    The parameters are 64 bits each in %d0 .. %d3 (%d0 is the output, 32 bits for each thread), and a tensor map, whose
    address is %d4. A kernel ends by storing %r1 for each thread.
    """

    name: str
    body: str
    threads: int = 128

    @property
    def ptx(self) -> str:
        """The entry's text."""
        parameters = [f".param .u64 {self.name}_param_{i}" for i in range(4)]
        parameters.append(f".param .align 128 .b8 {self.name}_param_4[128]")
        loads = "\n".join(f" ld.param.u64 %d{i}, [{self.name}_param_{i}];" for i in range(4))
        statements = "\n".join(f" {line.strip()};" for line in self.body.split(";") if line.strip())
        return (
            f".visible .entry {self.name}({', '.join(parameters)})\n{{\n"
            " .reg .pred %p, %q;\n .reg .b32 %r<32>;\n .reg .f32 %f<128>;\n .reg .b64 %d<16>;\n"
            f" mov.u32 %r0, %tid.x;\n{loads}\n mov.b64 %d4, {self.name}_param_4;\n cvta.param.u64 %d4, %d4;\n"
            f"{statements}\n mul.wide.u32 %d15, %r0, 4;\n add.s64 %d15, %d0, %d15;\n"
            " st.global.u32 [%d15], %r1;\n ret;\n}\n"
        )


def module_of(kernels: list[Kernel]) -> ModuleType:
    """The kernels, translated and compiled together."""
    return build.kernels_module(HEADER + "\n".join(kernel.ptx for kernel in kernels))


def aligned(values: Tensor) -> Tensor:
    """A copy at a multiple of 128 bytes."""
    room = 128 // values.element_size()
    space = torch.empty(values.numel() + room, dtype=values.dtype)
    start = -space.data_ptr() % 128 // values.element_size()
    return space[start : start + values.numel()].view(values.shape).copy_(values)


class Runner:
    """Runs kernels of one module. `inputs` and `outputs` are registered; more outputs than %d0 may be passed."""

    def __init__(self, module: ModuleType, lazy: bool, order: str = "in_order") -> None:
        self.module = module
        self._options = (order, 1, "ptx", lazy)
        self.last = torch.empty(0)  # result of the latest run that a caller kept
        module.clear_buffers()

    def buffer(self, name: str, values: Tensor, writable: bool = False) -> Tensor:
        """A copy of `values` that kernels may access."""
        placed = aligned(values)
        self.module.register_buffer(name, placed.data_ptr(), placed.nbytes, writable)
        return placed

    def run(self, kernel: Kernel, *arguments: int, tensor_map: bytes = bytes(128)) -> Tensor:
        """What the threads stored, as int32. Arguments are %d1, %d2, %d3."""
        out = self.buffer("out", torch.full((kernel.threads,), -1, dtype=torch.int32), writable=True)
        values = [out.data_ptr(), *arguments, *[0] * (3 - len(arguments))]
        packed = [value.to_bytes(8, "little") for value in values]
        self.module.set_options(*self._options)
        self.module.run_kernel(kernel.name, 1, kernel.threads, SHARED_BYTES, [*packed, tensor_map])
        return out
