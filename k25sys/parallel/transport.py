"""How rows travel between the ranks of one axis: ragged all-to-alls that stay in flight while the caller computes.

A row is bytes: gloo has no float8, and an FP8 row carries its scales behind its values.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.errors import BackendError, ShapeError, message

TRANSPORTS = ("torch", "deepep")


class Transfer(Protocol):
    """An exchange in flight."""

    def wait(self) -> Tensor:
        """The received tensor. On CUDA the current stream waits, not the host. Call it once."""
        ...


class Transport(Protocol):
    """Exchanges between the R ranks of a group. Every rank makes the same calls in the same order."""

    bytes_sent: int
    """Bytes of rows that went to other ranks so far; counts of rows are not among them."""

    def start_counts(self, counts_RN: Tensor) -> Transfer:
        """Starts sending row r of `counts_RN` (integers) to rank r; waiting gives (R, N), row r from rank r."""
        ...

    def start(self, rows_MB: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        """Starts sending rows: the first `send[0]` go to rank 0, the next `send[1]` to rank 1, and so on.

        Args:
            rows_MB: (M, B) uint8, contiguous, M = sum(send); it must not change before the wait.
            send, receive: (R,) rows to and from each rank, zeros among them. B is the same on all ranks.

        Waiting gives (sum(receive), B) uint8: the rows of rank 0 first, in the order in which it held them.
        """
        ...


@dataclass(frozen=True)
class _Arrived:
    """What never left this rank."""

    value: Tensor

    def wait(self) -> Tensor:
        return self.value


class _TorchTransfer:
    def __init__(self, work: dist.Work, sent: Tensor, received: Tensor) -> None:
        self.work, self.sent, self.received = work, sent, received

    def wait(self) -> Tensor:
        self.work.wait()
        del self.sent  # kept alive for the collective
        return self.received


class TorchTransport:
    """torch.distributed's all_to_all_single: gloo or NCCL. Of a group of None, one rank, nothing is communicated."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group, self.bytes_sent = group, 0

    def start_counts(self, counts_RN: Tensor) -> Transfer:
        """As in Transport."""
        if self.group is None:
            return _Arrived(counts_RN)
        counts_RN = counts_RN.contiguous()
        received = torch.empty_like(counts_RN)
        work = dist.all_to_all_single(received, counts_RN, group=self.group, async_op=True)
        return _TorchTransfer(_work(work), counts_RN, received)

    def start(self, rows_MB: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        """As in Transport."""
        if self.group is None:
            return _Arrived(rows_MB)
        self.bytes_sent += _bytes_to_others(rows_MB, send, self.group)
        received = rows_MB.new_empty((sum(receive), rows_MB.shape[1]))
        work = dist.all_to_all_single(received, rows_MB, list(receive), list(send), group=self.group, async_op=True)
        return _TorchTransfer(_work(work), rows_MB, received)


class _DeepEPTransfer:
    def __init__(self, event: Any, sent: Tensor, received: Tensor) -> None:
        self.event, self.sent, self.received = event, sent, received

    def wait(self) -> Tensor:
        self.event.current_stream_wait()
        del self.sent
        return self.received


class DeepEPTransport:
    """DeepEP's high-throughput kernels (deep_ep.Buffer, NVLink and RDMA) as a mover of rows.

    Each row goes to one rank, so both ways are `Buffer.dispatch` with one "expert" a rank: a copy of bytes, exact for
    every payload. What it does not use: DeepEP's sending of a token once to a rank that has several of its experts, and
    the sums inside `combine`. Its host waits for the received count in each exchange. Written against the source of
    DeepEP 1.x and 2.1 (dd758caf); it has not run on GPUs here.

    Args:
        group: ranks of the axis, on CUDA devices: fewer than 8, or a multiple of 8 for which DeepEP has settings.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._deep_ep = _import_deep_ep()
        self.group, self.bytes_sent = group, 0
        self._counts = TorchTransport(group)
        self._buffer: Any = None
        self._row_bytes = 0

    def start_counts(self, counts_RN: Tensor) -> Transfer:
        """As in Transport, by torch.distributed."""
        return self._counts.start_counts(counts_RN)

    def start(self, rows_MB: Tensor, send: Sequence[int], receive: Sequence[int]) -> Transfer:
        """As in Transport. Raises ShapeError where B is not a multiple of 16, the unit of DeepEP's copies."""
        row_bytes = rows_MB.shape[1]
        if row_bytes % 16:
            hint = "choose another hidden size or transport='torch'"
            raise ShapeError(message("DeepEPTransport", "B", row_bytes, "a multiple of 16 bytes a row", hint))
        buffer = self._buffer_for(row_bytes)
        self.bytes_sent += _bytes_to_others(rows_MB, send, self.group)
        ranks = torch.arange(len(send), device=rows_MB.device, dtype=self._deep_ep.topk_idx_t)
        rank_M1 = ranks.repeat_interleave(torch.tensor(send, device=rows_MB.device), output_size=len(rows_MB))[:, None]
        per_rank, per_rdma_rank, per_expert, is_in_rank, _ = buffer.get_dispatch_layout(rank_M1, len(send))
        received, _, _, _, _, event = buffer.dispatch(
            rows_MB, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank, num_tokens_per_expert=per_expert, async_finish=True,
        )  # fmt: skip
        assert received.shape == (sum(receive), row_bytes), f"{received.shape}, expected {sum(receive)} rows"
        return _DeepEPTransfer(event, rows_MB, received)

    def _buffer_for(self, row_bytes: int) -> Any:
        """Collective when rows are wider than before: all ranks see the same widths."""
        if row_bytes > self._row_bytes:
            buffer_type, num_ranks = self._deep_ep.Buffer, self.group.size()
            config = buffer_type.get_dispatch_config(num_ranks)
            nvlink = config.get_nvl_buffer_size_hint(row_bytes, num_ranks)
            rdma = config.get_rdma_buffer_size_hint(row_bytes, num_ranks)
            self._buffer, self._row_bytes = buffer_type(self.group, nvlink, rdma), row_bytes
        return self._buffer


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def _bytes_to_others(rows: Tensor, send: Sequence[int], group: dist.ProcessGroup) -> int:
    return (sum(send) - send[group.rank()]) * rows.shape[1]


def _import_deep_ep() -> ModuleType:
    """Raises ImportError where DeepEP is missing, or another project of its name is installed."""
    module = importlib.import_module("deep_ep")
    if not hasattr(module, "Buffer") or not hasattr(module, "topk_idx_t"):
        raise ImportError("the installed deep_ep has no Buffer: it is another project of that name")
    return module


@dataclass(frozen=True)
class Available:
    """One transport, on one kind of device."""

    name: str
    available: bool
    reason: str
    """Why it is not available; empty where it is."""


def listing(device_type: str) -> list[Available]:
    """The transports for a grid on "cpu" or "cuda", the default first."""
    return [Available("torch", True, ""), Available("deepep", not (why := _why_no_deepep(device_type)), why)]


def _why_no_deepep(device_type: str) -> str:
    if device_type != "cuda":
        return f"it moves rows of CUDA devices, and the grid is on {device_type}"
    try:
        _import_deep_ep()
    except (ImportError, OSError, AssertionError) as error:  # its import looks for CUDA, NCCL and its compiled part
        return f"{type(error).__name__}: {error}; build it from github.com/deepseek-ai/DeepEP (not PyPI's deep-ep)"
    return ""


def make(name: str, group: dist.ProcessGroup | None, device_type: str) -> Transport:
    """The transport `name` over `group`. Raises BackendError for an unknown or unavailable one, with the reason."""
    for item in listing(device_type):
        if item.name == name and item.available:
            return DeepEPTransport(group) if name == "deepep" and group is not None else TorchTransport(group)
    accepted = ", ".join(
        repr(item.name) if item.available else f"{item.name!r} (unavailable: {item.reason})"
        for item in listing(device_type)
    )
    raise BackendError(message("ExpertParallel", "transport", repr(name), accepted))
