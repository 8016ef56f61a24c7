"""Attention within documents against dense softmax, its implementations, and the largest logit of each head."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k25sys.errors import BackendError
from k25sys.models import KimiK25, attention_core
from k25sys.models.attention_core import AttentionCore, max_softmax_logits
from k25sys.models.documents import Documents
from tests.models.cases import ModelCase, model_cases, plain_case, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CPU = torch.device("cpu")
packings = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


@given(lengths=st.lists(st.integers(0, 5), max_size=6))
def test_documents_describe_the_rows(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    documents = Documents.from_cu_seqlens("test", bounds, sum(lengths), CPU)
    full = [length for length in lengths if length]
    assert documents.lengths == tuple(full)
    assert documents.num_rows == sum(full)
    assert documents.max_length == max(full, default=0)
    assert documents.positions_T.tolist() == [place for length in full for place in range(length)]
    assert documents.index_T.tolist() == [i for i, length in enumerate(full) for _ in range(length)]
    ends = documents.cu_seqlens.tolist()
    assert ends == sorted({*bounds.tolist()})
    assert documents.bounds == list(pairwise(ends))
    assert documents.cu_seqlens.dtype == torch.int32


def random_qkv(lengths: tuple[int, ...], value_dim: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of 3 heads and 8 query channels; q and k are large, so that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((8, 2.0), (8, 2.0), (value_dim, 1.0))
    return [torch.randn(sum(lengths), 3, n, generator=generator, dtype=dtype) * scale for n, scale in sizes]


def dense_scores(q: Tensor, k: Tensor, lengths: tuple[int, ...], scale: float, causal: bool) -> Tensor:
    """(H, T, T), -inf where a row does not see a column."""
    blocks = torch.block_diag(*[torch.ones(n, n) for n in lengths]).bool()
    visible = blocks.tril() if causal else blocks
    return (torch.einsum("ihc,jhc->hij", q, k) * scale).masked_fill(~visible, float("-inf"))


@settings(max_examples=60)
@given(
    lengths=packings, causal=st.booleans(), value_dim=st.sampled_from((4, 8, 12)), seed=st.integers(0, 999),
    implementation=st.sampled_from(("sdpa", "flex")),
)  # fmt: skip
def test_attention_equals_dense_softmax(
    lengths: tuple[int, ...], causal: bool, value_dim: int, seed: int, implementation: str
) -> None:
    q, k, v = random_qkv(lengths, value_dim, seed)
    core = AttentionCore(implementation, scale=0.3, causal=causal)
    want = torch.einsum("hij,jhv->ihv", dense_scores(q, k, lengths, 0.3, causal).softmax(-1), v)
    assert relative_error(core(q, k, v, Documents(lengths, CPU)), want) <= 2e-6


@given(lengths=packings, causal=st.booleans(), seed=st.integers(0, 999))
def test_attention_gradients_equal_dense_softmax(lengths: tuple[int, ...], causal: bool, seed: int) -> None:
    inputs = [x.requires_grad_() for x in random_qkv(lengths, 4, seed, torch.float64)]
    q, k, v = inputs
    core = AttentionCore("sdpa", scale=0.3, causal=causal)
    want = torch.einsum("hij,jhv->ihv", dense_scores(q, k, lengths, 0.3, causal).softmax(-1), v)
    got = core(q, k, v, Documents(lengths, CPU))
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@settings(max_examples=80)
@given(lengths=packings, causal=st.booleans(), tile=st.integers(1, 7), seed=st.integers(0, 999))
def test_max_logits_equal_the_dense_maximum(lengths: tuple[int, ...], causal: bool, tile: int, seed: int) -> None:
    q, k, _ = random_qkv(lengths, 8, seed)
    want = dense_scores(q, k, lengths, 0.3, causal).amax((1, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_core, "_TILE", tile)
        got = max_softmax_logits(q, k, Documents(lengths, CPU), scale=0.3, causal=causal)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@settings(max_examples=15)
@given(case=model_cases(), data=st.data())
def test_the_model_reports_the_largest_logit_of_each_layer_and_head(case: ModelCase, data: st.DataObject) -> None:
    model = case.model()
    ids, pixels, grid = case.tensors()
    cut = data.draw(st.integers(0, ids.numel()), label="cut")
    lengths = tuple(n for n in (cut, ids.numel() - cut) if n)
    want: list[Tensor] = []

    def record(core: Any, inputs: tuple[Any, ...]) -> None:
        if core.causal:
            want.append(dense_scores(inputs[0], inputs[1], lengths, core.scale, True).amax((1, 2)))

    for module in model.modules():
        if isinstance(module, AttentionCore):
            module.register_forward_pre_hook(record)
    largest = torch.full((case.layers, case.heads), float("-inf"))
    logits = model(ids, pixels, grid, cu_seqlens=[0, cut, ids.numel()], max_logits_LH=largest)
    torch.testing.assert_close(largest, torch.stack(want), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, model(ids, pixels, grid, cu_seqlens=[0, cut, ids.numel()]))
    kept = largest.clone()
    raised = largest.clone().fill_(1e3)
    model(ids, pixels, grid, cu_seqlens=[0, cut, ids.numel()], max_logits_LH=raised)
    assert (raised == 1e3).all(), "a smaller logit lowered the maximum"
    assert torch.equal(largest, kept)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs `func` and looks at what it returns."""
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return out


def test_scores_are_never_materialised() -> None:
    case = plain_case(layers=1, dense_layers=1, heads=1, clips=(), positions=4096)
    model, num_tokens = case.model(), 4096
    ids = torch.randint(0, 60, (1, num_tokens))
    largest = torch.full((1, 1), float("-inf"))
    with LargestTensor() as seen:
        model(ids, max_logits_LH=largest).square().mean().backward()
    assert seen.largest < num_tokens**2 / 8


def test_implementations_are_chosen_by_name() -> None:
    case = plain_case()
    sdpa, (ids, pixels, grid) = case.model(), case.tensors()
    flex = KimiK25(case.config(), attention="flex")
    flex.load_state_dict(sdpa.state_dict())
    with torch.no_grad():
        assert relative_error(flex(ids, pixels, grid), sdpa(ids, pixels, grid)) <= 1e-5
    with pytest.raises(BackendError, match="'flex' with a gradient on cpu, accepted 'sdpa'"):
        flex(ids, pixels, grid)
    with pytest.raises(BackendError, match="got 'eager', accepted sdpa"):
        KimiK25(case.config(), attention="eager")
    flash = KimiK25(case.config(), attention="flash_attn")
    with pytest.raises(BackendError, match=r"'flash_attn'.*accepted 'sdpa' or 'flex'"):
        flash(ids, pixels, grid)


@pytest.mark.parametrize("value_dim", [4, 8, 12])
def test_a_kernel_of_one_width_gets_one(value_dim: int) -> None:
    """Values narrower, as wide and wider than queries; the kernel is dense softmax behind flash-attn's signature."""
    lengths, scale = (5, 1, 7), 0.3
    q, k, v = random_qkv(lengths, value_dim, seed=3)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, softmax_scale: float, causal: bool) -> Tensor:
        assert q.shape == k.shape == v.shape
        assert bounds[0].tolist() == [0, 5, 6, 13]
        assert bounds[2:] == (7, 7)
        return torch.einsum("hij,jhc->ihc", dense_scores(q, k, lengths, softmax_scale, causal).softmax(-1), v)

    documents = Documents.from_cu_seqlens("test", torch.tensor([0, 5, 6, 13]), 13, CPU)
    out = attention_core._varlen(kernel, q, k, v, documents, scale, True)
    exact = torch.einsum("hij,jhc->ihc", dense_scores(q, k, lengths, scale, True).softmax(-1), v)
    assert out.shape == v.shape
    assert relative_error(out, exact) <= 1e-6
