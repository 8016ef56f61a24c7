"""Newton-Schulz, the update rules and QK-Clip against independent forms of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import ArgumentValueError, ShapeError
from k25sys.models.attention import LatentAttention
from k25sys.models.config import TextConfig
from k25sys.models.documents import Documents
from k25sys.models.presets import preset
from k25sys.models.rope import text_tables
from k25sys.optim.muon_clip import (
    MuonClipConfig,
    adamw_update,
    advance_momentum,
    decay_and_step,
    update_scale,
)
from k25sys.optim.newton_schulz import orthogonalize
from k25sys.optim.qk_clip import clip_factors, key_value_row_factors, query_row_factors, scale_rows

TEXT: TextConfig = preset("tiny").text


def iterate(m: torch.Tensor) -> torch.Tensor:
    """The iteration on singular values alone: s -> a s + b s^3 + c s^5, five times."""
    u, s, v = torch.linalg.svd(m.double(), full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@given(st.integers(1, 5), st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_orthogonalize_is_the_iteration_of_the_singular_values(batch: int, n: int, m: int, seed: int) -> None:
    drawn = torch.randn(batch, n, m, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([iterate(each) for each in drawn])
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        got = orthogonalize(drawn.to(dtype))
        assert float((got.double() - expected).norm() / expected.norm()) <= bound
    torch.testing.assert_close(orthogonalize(drawn[0].double()), expected[0], rtol=1e-9, atol=1e-10)


def test_orthogonalize_in_bfloat16_and_of_zeros() -> None:
    drawn = torch.randn(3, 40, 24)
    got = orthogonalize(drawn, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    values = torch.linalg.svdvals(got.double())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.35
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


def test_adamw_is_torchs() -> None:
    config = MuonClipConfig(weight_decay=0.07)
    weight = torch.nn.Parameter(torch.randn(30, dtype=torch.float64))
    master, first, second = weight.detach().clone(), torch.zeros(30).double(), torch.zeros(30).double()
    peer = torch.optim.AdamW([weight], lr=0.03, betas=config.adam_betas, eps=config.adam_epsilon, weight_decay=0.07)
    for step in range(1, 6):
        gradient = torch.randn(30, dtype=torch.float64)
        weight.grad = gradient.clone()
        peer.step()
        decay_and_step(master, adamw_update(first, second, gradient, step, config), 0.03, config)
        torch.testing.assert_close(master, weight.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"momentum": 1.0}, "MuonClipConfig: momentum: got 1.0, accepted a number of [0, 1)"),
        ({"max_logit": 0.0}, "max_logit: got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"newton_schulz_steps": 0}, "newton_schulz_steps: got 0"),
    ],
)
def test_constants_out_of_range_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ArgumentValueError) as error:
        MuonClipConfig(**changes)
    assert text in str(error.value)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match="orthogonalize: m_BNM"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(ShapeError, match="elements 0 to 9, accepted elements of a weight of 4 x 2"):
        scale_rows(torch.zeros(9), torch.ones(4), 0, 2)


class Attention:
    """A layer whose weights are large, and how to see its largest logits."""

    def __init__(self, growth: float) -> None:
        generator = torch.Generator().manual_seed(2)
        self.layer = LatentAttention(TEXT, implementation="sdpa").double()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * growth)
        self.documents = Documents((20, 12), torch.device("cpu"))
        self.tables = text_tables(TEXT, self.documents.positions_T)
        self.x = torch.randn(32, TEXT.hidden_size, generator=generator, dtype=torch.float64)

    def max_logits(self) -> torch.Tensor:
        """(H,)"""
        largest = torch.full((TEXT.num_attention_heads,), float("-inf"))
        with torch.no_grad():
            self.layer(self.x, self.tables, self.documents, max_logits_H=largest)
        return largest

    def clip(self, max_logit: float) -> None:
        """QK-Clip of this layer, in flat pieces as shards hold them."""
        gamma_H = clip_factors(self.max_logits(), max_logit)
        nope, rope, value = TEXT.qk_nope_head_dim, TEXT.qk_rope_head_dim, TEXT.v_head_dim
        for weight, factors in (
            (self.layer.q_b_proj.weight, query_row_factors(gamma_H, nope=nope, rope=rope)),
            (self.layer.kv_b_proj.weight, key_value_row_factors(gamma_H, nope=nope, value=value)),
        ):
            flat = weight.detach().view(-1)
            for begin in range(0, len(flat), 1000):
                scale_rows(flat[begin : begin + 1000], factors, begin, weight.shape[1])


def test_qk_clip_brings_the_largest_logit_to_its_threshold() -> None:
    attention = Attention(0.6)
    before = attention.max_logits()
    limit = float(before.sort().values[1])  # two heads above, one at, one below
    weights = {name: weight.clone() for name, weight in attention.layer.state_dict().items()}
    attention.clip(limit)
    after = attention.max_logits()
    torch.testing.assert_close(after, before.clamp_max(limit), rtol=1e-6, atol=1e-6)
    heads = (before > limit).nonzero()[:, 0].tolist()
    nope, rope, value = TEXT.qk_nope_head_dim, TEXT.qk_rope_head_dim, TEXT.v_head_dim
    for name, weight in attention.layer.state_dict().items():
        changed = (weight != weights[name]).reshape(len(weight), -1).any(-1).nonzero()[:, 0].tolist()
        expected = []
        if name == "q_b_proj.weight":
            expected = [h * (nope + rope) + i for h in heads for i in range(nope + rope)]
        elif name == "kv_b_proj.weight":
            expected = [h * (nope + value) + i for h in heads for i in range(nope)]
        assert changed == expected, name


def grow(*, clip: bool) -> list[float]:
    """Largest logits of a layer that learns to attend to the first row of each document alone: the sharper its softmax,
    the smaller the loss."""
    attention = Attention(0.25)
    config = MuonClipConfig(weight_decay=0.0)
    trained = [p for p in attention.layer.parameters() if p.dim() == 2]
    momenta = [torch.zeros_like(p) for p in trained]
    starts = torch.tensor([0] * 20 + [20] * 12)
    found = []
    for _ in range(100):
        attention.layer.zero_grad()
        out = attention.layer(attention.x, attention.tables, attention.documents)
        (out - attention.x[starts]).square().mean().backward()
        for weight, momentum in zip(trained, momenta, strict=True):
            assert weight.grad is not None
            update = orthogonalize(advance_momentum(momentum, weight.grad, config))
            decay_and_step(weight.detach(), update * update_scale(*weight.shape), 0.6, config)
        if clip:
            attention.clip(100.0)
        found.append(float(attention.max_logits().max()))
    return found


def test_without_qk_clip_the_logits_run_away() -> None:
    wild, tame = grow(clip=False), grow(clip=True)
    print(f"largest logit in 100 steps: {max(wild):.0f} without, {max(tame):.1f} with")
    assert max(wild) > 1e4
    assert max(tame) <= 100.0 * (1 + 1e-6)
