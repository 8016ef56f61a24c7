"""Transports move the rows they are told to, in order; DeepEP's is checked against a stand-in for its Buffer.

The stand-in keeps to what DeepEP's Python and C++ sources document and assert (deep_ep/buffers/legacy.py,
csrc/legacy/buffer.hpp of dd758caf); it cannot show that DeepEP's kernels do.
"""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.errors import BackendError, ShapeError
from k25sys.parallel import transport
from k25sys.parallel.transport import DeepEPTransport, TorchTransport, Transport
from tests.parallel.processes import run_ranks


class _Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class _Event:
    def __init__(self, received: Tensor, value: Tensor) -> None:
        self.received, self.value = received, value

    def current_stream_wait(self) -> None:
        self.received.copy_(self.value)


class _Buffer:
    """deep_ep.Buffer's dispatch without a handle: received rows are poisoned until the event was waited for."""

    made: list[int]

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group = group
        self.made.append(num_nvl_bytes)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> _Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return _Config()

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == torch.int64
        ranks = torch.arange(self.group.size())
        is_in_rank = topk_idx // (num_experts // len(ranks)) == ranks
        per_expert = topk_idx.flatten().bincount(minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, None

    def dispatch(
        self, x: Tensor, *, num_tokens_per_rank: Tensor, num_tokens_per_rdma_rank: None, is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor, async_finish: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        num_ranks = self.group.size()
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0
        assert is_token_in_rank.dtype == torch.bool
        assert is_token_in_rank.shape == (len(x), num_ranks)
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert num_tokens_per_rank.shape == (num_ranks,)
        assert num_tokens_per_rdma_rank is None
        assert num_tokens_per_expert.shape[0] % num_ranks == 0
        assert async_finish
        outgoing: list[Any] = [x[is_token_in_rank[:, rank]] for rank in range(num_ranks)]
        assert [len(rows) for rows in outgoing] == num_tokens_per_rank.tolist()
        boxes: list[Any] = [None] * num_ranks
        dist.all_gather_object(boxes, outgoing, group=self.group)
        value = torch.cat([box[self.group.rank()] for box in boxes])
        received = torch.full_like(value, 255)
        return received, None, None, [0], (), _Event(received, value)


def _stand_in() -> ModuleType:
    module = ModuleType("deep_ep")
    module.Buffer = type("Buffer", (_Buffer,), {"made": []})  # type: ignore[attr-defined]
    module.topk_idx_t = torch.int64  # type: ignore[attr-defined]
    return module


def _rows(source: int, target: int, row_bytes: int) -> Tensor:
    """What `source` sends to `target`: rows that name both and their place."""
    num_rows = (source * 3 + target * 5) % 4 if source != 1 else 0  # rank 1 has nothing to send
    rows = torch.arange(num_rows * row_bytes).view(num_rows, row_bytes) + 16 * source + target
    return rows.to(torch.uint8)


def _move(moved: Transport, rank: int, row_bytes: int) -> None:
    ranks = range(dist.get_world_size())
    outgoing = [_rows(rank, target, row_bytes) for target in ranks]
    incoming = [_rows(source, rank, row_bytes) for source in ranks]
    before = moved.bytes_sent
    transfer = moved.start(torch.cat(outgoing), [len(rows) for rows in outgoing], [len(rows) for rows in incoming])
    assert torch.equal(transfer.wait(), torch.cat(incoming))
    to_others = sum(len(rows) for target, rows in enumerate(outgoing) if target != rank)
    assert moved.bytes_sent - before == to_others * row_bytes
    counts = torch.arange(len(ranks) * 2, dtype=torch.int32).view(-1, 2) + 100 * rank
    expected = torch.stack([torch.tensor([2 * rank, 2 * rank + 1]) + 100 * source for source in ranks])
    assert moved.start_counts(counts).wait().tolist() == expected.tolist()


def _both_transports() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    with mock.patch.dict(sys.modules, {"deep_ep": (module := _stand_in())}):
        deep = DeepEPTransport(group)
        for row_bytes in (32, 16, 64):
            _move(TorchTransport(group), rank, row_bytes)
            _move(deep, rank, row_bytes)
        # Made once, and again for wider rows.
        assert module.Buffer.made == [32 * 4, 64 * 4]
        with pytest.raises(ShapeError, match="B: got 24, accepted a multiple of 16 bytes a row; choose another hidden"):
            deep.start(torch.zeros(0, 24, dtype=torch.uint8), [0] * 4, [0] * 4)


def test_rows_arrive_in_order() -> None:
    run_ranks(4, _both_transports)


def test_one_rank_keeps_its_rows() -> None:
    alone = transport.make("torch", None, "cpu")
    rows = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert alone.start(rows, [2], [2]).wait() is rows
    assert alone.start_counts(rows).wait() is rows
    assert alone.bytes_sent == 0


def test_transports_are_listed_with_reasons() -> None:
    torch_transport, deepep = transport.listing("cpu")
    assert (torch_transport.name, torch_transport.available, torch_transport.reason) == ("torch", True, "")
    assert not deepep.available
    assert deepep.reason == "it moves rows of CUDA devices, and the grid is on cpu"
    with mock.patch.dict(sys.modules, {"deep_ep": None}):
        (reason,) = [item.reason for item in transport.listing("cuda") if not item.available]
        assert reason.startswith("ModuleNotFoundError")
        assert "build it from github.com/deepseek-ai/DeepEP (not PyPI's deep-ep)" in reason
    with mock.patch.dict(sys.modules, {"deep_ep": ModuleType("deep_ep")}):
        assert "another project of that name" in transport.listing("cuda")[1].reason
        with pytest.raises(BackendError, match=r"got 'deepep', accepted 'torch', 'deepep' \(unavailable: ImportError"):
            transport.make("deepep", None, "cuda")
    with mock.patch.dict(sys.modules, {"deep_ep": _stand_in()}):
        assert transport.listing("cuda")[1].available
