"""Context parallel: chunks and who sees what, layers and a decoder over ranks against one process, balance, errors."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from k25sys.errors import ArgumentTypeError, ArgumentValueError, GridError, ShapeError
from k25sys.models import attention_core
from k25sys.models.attention import LatentAttention
from k25sys.models.attention_core import AttentionCore
from k25sys.models.config import TextConfig
from k25sys.models.decoder import Decoder
from k25sys.models.documents import Documents
from k25sys.models.latent_cache import LatentCache
from k25sys.models.rope import text_tables
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.context import (
    ContextParallelCore,
    ShardedDocuments,
    chunks,
    gather_tokens,
    join_tokens,
    shard_documents,
    split_tokens,
)
from tests.models.cases import relative_error
from tests.parallel.processes import run_ranks
from tests.parallel.tally import Tally

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
packings = st.lists(st.integers(0, 12), max_size=6).map(tuple)


@st.composite
def sharded(draw: st.DrawFn) -> ShardedDocuments:
    """Any packing, cut for any rank of up to 5."""
    size = draw(st.integers(1, 5))
    return ShardedDocuments(draw(packings), CPU, size, draw(st.integers(0, size - 1)))


@given(st.integers(0, 400), st.integers(1, 9), st.integers(1, 4))
def test_chunks_are_as_even_as_they_can_be(units: int, size: int, multiple: int) -> None:
    parts = chunks(units * multiple, size, multiple=multiple)
    assert [row for part in parts for row in part] == list(range(units * multiple))
    assert len(parts) == 2 * size
    lengths = [len(part) for part in parts]
    assert all(length % multiple == 0 for length in lengths)
    assert max(lengths) - min(lengths) <= multiple
    by_rank = [lengths[r] + lengths[2 * size - 1 - r] for r in range(size)]
    assert units % size or len(set(by_rank)) == 1
    assert max(by_rank) - min(by_rank) <= 2 * multiple


@given(documents=sharded())
def test_each_token_sees_its_document_up_to_itself_and_nothing_is_gathered_in_vain(documents: ShardedDocuments) -> None:
    whole = Documents(tuple(n for n in documents.document_lengths if n), CPU)
    exchange = documents.exchange
    gathered = [row for part in exchange.needed[documents.index] for row in part]
    tokens = documents.tokens_T.tolist()
    seen: dict[int, list[int]] = {}
    for rows, keys in documents.pieces:
        for i, row in enumerate(rows):
            seen[tokens[row]] = [gathered[key] for key in keys[: len(keys) - len(rows) + i + 1]]
    assert sorted(seen) == tokens
    index, position = whole.index_T.tolist(), whole.positions_T.tolist()
    for token, keys in seen.items():
        assert keys == list(range(token - position[token], token + 1))
    assert gathered == sorted({key for keys in seen.values() for key in keys})
    assert documents.positions_T.tolist() == [position[token] for token in tokens]
    filled = [i for i, n in enumerate(documents.document_lengths) if n]
    assert documents.index_T.tolist() == [filled[index[token]] for token in tokens]
    assert documents.num_rows == len(tokens) == sum(documents.lengths)
    assert documents.num_keys == len(gathered)
    assert documents.pairs_by_rank[documents.index] == sum(len(keys) for keys in seen.values())


@given(documents=sharded(), width=st.integers(1, 3))
def test_what_is_split_is_joined_again(documents: ShardedDocuments, width: int) -> None:
    x_TX = torch.arange(documents.num_all_rows * width).view(-1, width)
    parts = [split_tokens(x_TX, replace(documents, index=r)) for r in range(documents.size)]
    assert torch.equal(join_tokens(parts, documents), x_TX)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16, 64])
def test_one_long_document_is_balanced(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    heads, channels = 64, 192 + 128
    for length in (4096, 10_007, 262_144):
        pairs = ShardedDocuments((length,), CPU, size, 0).pairs_by_rank
        assert sum(pairs) == length * (length + 1) // 2
        largest = max(pairs) / (sum(pairs) / size)
        with capsys.disabled():
            tera = [round(2 * heads * channels * n / 1e12, 3) for n in (min(pairs), max(pairs))]
            print(f"\n{length} tokens, {size} ranks: TFLOP least {tera[0]}, most {tera[1]}; max/mean {largest:.4f}")
        assert largest <= 1.05


@settings(max_examples=60)
@given(documents=sharded(), seed=st.integers(0, 999), implementation=st.sampled_from(("sdpa", "flex", "flash_attn")))
def test_pieces_attend_as_dense_softmax_does(documents: ShardedDocuments, seed: int, implementation: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(documents.num_all_rows, 2, n, generator=generator) for n in (8, 8, 4))
    whole = Documents(tuple(n for n in documents.document_lengths if n), CPU)
    want = split_tokens(AttentionCore("sdpa", scale=0.3, causal=True)(q, k, v, whole), documents)
    gathered = [row for part in documents.exchange.needed[documents.index] for row in part]
    mine = split_tokens(q, documents), k[gathered], v[gathered]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_core, "_MASK_ENTRIES", 3 * max(1, len(gathered)))  # three rows a mask
        patch.setattr(attention_core, "_TILE", 3)
        core = AttentionCore(implementation, scale=0.3, causal=True)
        if implementation == "flash_attn" and documents.num_rows:
            got = attention_core._varlen(_dense_varlen, *mine, documents, 0.3, True)
        else:
            got = core(*mine, documents)
        largest_H = core.max_logits(mine[0], mine[1], documents)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    every = replace(documents, size=1, index=0)
    if documents.size == 1:
        torch.testing.assert_close(largest_H, core.max_logits(q, k, every), rtol=1e-6, atol=0)


def _dense_varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, key_bounds: Tensor, longest: int, longest_keys: int,
    *, softmax_scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func as its documentation has it: the diagonal ends at the last row and the last key."""
    assert causal
    out = []
    spans = zip(bounds.tolist(), bounds.tolist()[1:], key_bounds.tolist(), key_bounds.tolist()[1:], strict=False)
    for begin, end, first, last in spans:
        assert end - begin <= longest
        assert last - first <= longest_keys
        scores = torch.einsum("ihc,jhc->hij", q[begin:end], k[first:last]) * softmax_scale
        hidden = torch.ones(scores.shape[1:]).triu((last - first) - (end - begin) + 1).bool()
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(torch.einsum("hij,jhv->ihv", weights, v[first:last]))
    return torch.cat(out)


def _config(q_rank: int | None) -> TextConfig:
    return TextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=40, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=3, q_lora_rank=q_rank, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=5, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        routed_scaling_factor=1.5, rope_theta=50000.0, yarn=None, max_position_embeddings=4096,
    )  # fmt: skip


def _randomize(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.mul_(0.1).add_(1.0)
        for buffer in module.buffers():
            buffer.normal_(0.0, 0.1, generator=generator)


def _packing(generator: random.Random, size: int, dtype: torch.dtype) -> tuple[int, ...]:
    """One giant document, documents shorter than chunks, anything, or, in float64, fewer tokens than chunks.

    There the softmax is over one or two keys and cancels: what one process gets in float32 is not exact to 1e-6 itself.
    """
    kind = generator.randrange(4 if dtype == torch.float64 else 3)
    if kind == 0:
        return (generator.randint(8 * size, 90),)
    if kind == 1:
        return tuple(generator.randint(1, 3) for _ in range(generator.randint(4 * size, 40)))
    if kind == 2:
        return tuple(generator.randint(1, 25) for _ in range(generator.randint(2, 8)))
    return (1,) if generator.random() < 0.3 else (2, *(1 for _ in range(generator.randint(0, 2 * size - 2))))


class _Attention(nn.Module):
    """An attention layer with the decoder's interface."""

    def __init__(self, config: TextConfig, *, attention: str) -> None:
        super().__init__()
        self.config = config
        self.attention = LatentAttention(config, implementation=attention)

    def forward(self, x_TD: Tensor, documents: Any, *, max_logits_LH: Tensor) -> Tensor:
        tables = text_tables(self.config, documents.positions_T)
        return self.attention(x_TD, tables, documents, max_logits_H=max_logits_LH[0])


def _run(
    module: nn.Module, x_TD: Tensor, targets_TD: Tensor, documents: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, largest logits, gradients of a sum over the tokens here."""
    x_TD = x_TD.clone().requires_grad_()
    logits_LH = torch.full((2, 3), float("-inf"))
    module.zero_grad()
    out_TD = module(x_TD, documents, max_logits_LH=logits_LH)
    (out_TD * targets_TD).sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert x_TD.grad is not None
    return out_TD.detach(), logits_LH, {**gradients, "x": x_TD.grad}


def _parallelize(module: nn.Module, grid: RankGrid) -> None:
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LatentAttention)]
    for layer in layers:
        layer.core = ContextParallelCore(layer.core, grid)


@dataclass
class _Found(Tally):
    """What a rank has found over many packings."""

    logits: float = 0.0
    num_empty: int = 0
    num_crossed: int = 0


def _against_one_process(kind: str, dtype: torch.dtype, most: float, seeds: range) -> _Found:
    """Outputs, gradients and largest logits over packings drawn by `seeds`, against one process's."""
    size = dist.get_world_size()
    grid = RankGrid.create(GridSizes(context=size))
    group = grid.group("context")
    tally = _Found()
    make: Callable[..., nn.Module] = {"attention": _Attention, "decoder": Decoder}[kind]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        module = make(_config(None if seed % 3 == 0 else 12), attention="sdpa").to(dtype)
        _randomize(module, generator)
        documents = Documents(_packing(random.Random(seed), size, dtype), CPU)
        x_TD = torch.randn(documents.num_rows, 32, generator=generator).to(dtype)
        targets_TD = torch.rand(documents.num_rows, 32, generator=generator).to(dtype)
        want_out, want_logits, want = _run(module, x_TD, targets_TD, documents)
        exact_out, _, exact = _run(deepcopy(module).double(), x_TD.double(), targets_TD.double(), documents)
        _parallelize(module, grid)
        mine = shard_documents(documents, grid)
        out, logits, got = _run(module, split_tokens(x_TD, mine), split_tokens(targets_TD, mine), mine)
        dist.all_reduce(logits, dist.ReduceOp.MAX, group=group)
        joined = {"x": gather_tokens(got.pop("x"), mine, grid)}
        for name, gradient in want.items():
            if name != "x":
                total = got.get(name, torch.zeros_like(gradient)).double()
                dist.all_reduce(total, group=group)
                joined[name] = total.to(dtype)
        joined["out"] = gather_tokens(out, mine, grid)
        tally.add(joined, {**want, "out": want_out}, {**exact, "out": exact_out}, most)
        if dtype != torch.bfloat16:
            finite = want_logits.isfinite()
            assert torch.equal(finite, logits.isfinite())
            tally.logits = max(tally.logits, relative_error(logits[finite], want_logits[finite]))
        tally.num_empty += mine.num_rows == 0
        tally.num_crossed += len(mine.pieces) > len({int(i) for i in mine.index_T})
    return tally


_CASES = [
    ("attention", torch.float64, 1e-13, range(20)),
    ("attention", torch.float32, 1e-6, range(14)),
    ("decoder", torch.float64, 1e-13, range(12)),
    ("decoder", torch.float32, 1e-6, range(16)),
    ("attention", torch.bfloat16, 0.0, range(8)),
]


def _all_cases() -> list[_Found]:
    return [_against_one_process(*case) for case in _CASES]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_layers_equal_one_process(size: int) -> None:
    by_rank = run_ranks(size, _all_cases)
    for (kind, dtype, most, _), tallies in zip(_CASES, zip(*by_rank, strict=True), strict=True):
        print(f"{size} ranks, {kind} in {dtype}: {tallies[0]}")
        assert all(tally.error <= most and tally.logits <= 1e-6 for tally in tallies)
        assert dtype == torch.bfloat16 or all(tally.num_rounded <= 0.01 * tally.num_tensors for tally in tallies)
    found = [tally for tallies in by_rank for tally in tallies]
    assert sum(tally.num_empty for tally in found) >= size - 1
    assert sum(tally.num_crossed for tally in found) >= 10


class _LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel())
        return out


def test_no_mask_of_all_pairs_is_formed_for_a_long_document() -> None:
    documents = ShardedDocuments((1 << 13,), CPU, 2, 0)
    q, k = torch.randn(documents.num_rows, 1, 4), torch.randn(documents.num_keys, 1, 4)
    with pytest.MonkeyPatch.context() as patch, _LargestTensor() as largest:
        patch.setattr(attention_core, "_MASK_ENTRIES", 1 << 16)
        AttentionCore("sdpa", scale=0.3, causal=True)(q, k, k, documents)
    assert (1 << 13) * 4 <= largest.entries <= 1 << 16


def _flex_and_no_tokens() -> tuple[float, list[int]]:
    """FlexAttention's error over ranks, and the shapes of a micro-batch without tokens, forward and backward."""
    size = dist.get_world_size()
    grid = RankGrid.create(GridSizes(context=size))
    config = _config(12)
    module = _Attention(config, attention="flex")
    _randomize(module, torch.Generator().manual_seed(0))
    documents = Documents((5, 31, 1, 1, 90, 2), CPU)
    x_TD = torch.randn(documents.num_rows, 32, generator=torch.Generator().manual_seed(1))
    logits_LH = torch.zeros(2, 3)
    with torch.no_grad():
        want = module(x_TD, documents, max_logits_LH=logits_LH)
        _parallelize(module, grid)
        mine = shard_documents(documents, grid)
        got = module(split_tokens(x_TD, mine), mine, max_logits_LH=logits_LH)
    error = relative_error(gather_tokens(got, mine, grid), want)
    nobody = shard_documents(Documents((), CPU), grid)
    out, _, gradients = _run(module, torch.zeros(0, 32), torch.zeros(0, 32), nobody)
    return error, [len(out), len(gradients["x"])]


def test_flex_and_a_micro_batch_without_tokens() -> None:
    for error, lengths in run_ranks(3, _flex_and_no_tokens):
        assert error <= 1e-6
        assert lengths == [0, 0]


def _row_gradients_in_bfloat16() -> list[float]:
    """Each rank adds 1 + 2^-8 or 2^-8 in bfloat16 to each row's gradient: exact in float32, and rounded once."""
    grid = RankGrid.create(GridSizes(context=dist.get_world_size()))
    documents = shard_documents(Documents((8,), CPU), grid)
    x_TX = torch.zeros(documents.num_rows, 1, dtype=torch.bfloat16, requires_grad=True)
    out = gather_tokens(x_TX, documents, grid)
    out.backward(torch.full_like(out, 1.0 if grid.rank == 0 else 2.0**-9))
    assert x_TX.grad is not None
    return x_TX.grad.flatten().tolist()


def test_gradients_of_bfloat16_rows_are_summed_in_float32() -> None:
    # 1 + 3 * 2^-9 = 1.00586: the nearest bfloat16 is 1 + 2^-7; each single step would have been rounded back to 1.
    for gradients in run_ranks(4, _row_gradients_in_bfloat16):
        assert gradients == [1 + 2.0**-7] * 2


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: chunks(8, 0), ArgumentValueError, "chunks: size: got 0, accepted an int >= 1"),
        (lambda: chunks(8, 2, multiple=3), ArgumentValueError, "num_tokens: got 8, accepted a multiple of 3; pad the"),
        (lambda: ShardedDocuments((4,), CPU, 2, 2), ArgumentValueError, "index: got 2, accepted 0 to 1"),
        (lambda: ShardedDocuments((4, -1), CPU, 2, 1), ArgumentValueError, r"document_lengths: got \(4, -1\)"),
        (
            lambda: split_tokens(torch.zeros(3), ShardedDocuments((4,), CPU, 2, 1)),
            ShapeError,
            r"split_tokens: x_TX: got shape \(3,\), accepted 4 rows",
        ),
        (
            lambda: join_tokens([torch.zeros(3), torch.zeros(1)], ShardedDocuments((4,), CPU, 2, 1)),
            ShapeError,
            r"join_tokens: parts: got \[3, 1\] rows, accepted \[2, 2\]",
        ),
    ],
)
def test_impossible_cuts_are_refused(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_what_does_not_fit_is_refused_before_anybody_waits() -> None:
    grid = RankGrid.create(GridSizes())
    core = ContextParallelCore(AttentionCore("sdpa", scale=1.0, causal=True), grid)
    rows = (torch.zeros(4, 2),)
    with pytest.raises(GridError, match="got those of rank 1 of 2, accepted rank 0 of 1"):
        core.gather(rows, ShardedDocuments((4,), CPU, 2, 1))
    with pytest.raises(ShapeError, match="rows: got 4 rows, accepted 5"):
        core.gather(rows, ShardedDocuments((5,), CPU, 1, 0))
    patches = ContextParallelCore(AttentionCore("sdpa", scale=1.0, causal=False), grid)
    with pytest.raises(ArgumentValueError, match="got ShardedDocuments, accepted rows cut for attention with causal=F"):
        patches.gather(rows, ShardedDocuments((4,), CPU, 1, 0))
    assert core.gather(rows, ShardedDocuments((4,), CPU, 1, 0))[0].equal(rows[0])
    assert core.gather(rows, Documents((4,), CPU)) is rows


def test_a_cache_needs_all_tokens() -> None:
    config = _config(None)
    layer = LatentAttention(config, implementation="sdpa")
    documents = Documents((4,), CPU)
    cache = LatentCache(num_layers=1, latent_dim=8, prompts=documents, samples_per_prompt=1)
    tables = text_tables(config, documents.positions_T)
    with pytest.raises(ArgumentTypeError, match="documents: got ShardedDocuments, accepted Documents, beside a cache"):
        layer(torch.zeros(4, 32), tables, ShardedDocuments((4,), CPU, 1, 0), cache=cache.layers[0])
