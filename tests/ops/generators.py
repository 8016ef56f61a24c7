"""The cases that every face of every op is checked with."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class MoeCase:
    """Sizes of one MoE layer and how its tokens choose experts."""

    num_tokens: int
    num_experts: int
    top_k: int
    dim: int
    width: int
    dtype: torch.dtype
    routing: str  # uniform, one_expert (all slots on the last expert), skewed (most experts empty)
    seed: int

    def tensors(self) -> "MoeTensors":
        """The inputs, the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        high = self.num_experts if self.routing == "uniform" else max(1, self.num_experts // 8)
        experts = torch.randint(0, high, (self.num_tokens, self.top_k), generator=generator)
        if self.routing == "one_expert":
            experts.fill_(self.num_experts - 1)
        routing_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return MoeTensors(
            x_TD=normal(self.num_tokens, self.dim).to(self.dtype),
            gate_up_EGD=(normal(self.num_experts, 2 * self.width, self.dim) / self.dim**0.5).to(self.dtype),
            down_EDI=(normal(self.num_experts, self.dim, self.width) / self.width**0.5).to(self.dtype),
            weights_TK=normal(self.num_tokens, self.top_k).to(routing_dtype),
            experts_TK=experts.int(),
            rows_MD=normal(self.num_tokens * self.top_k, self.dim).to(self.dtype),
            logits_TE=normal(self.num_tokens, self.num_experts).to(self.dtype),
            bias_E=(normal(self.num_experts) * 0.1).float(),
            grad_TD=normal(self.num_tokens, self.dim).to(self.dtype),
        )


@dataclass(frozen=True, kw_only=True)
class MoeTensors:
    """Inputs of all ops for one case."""

    x_TD: Tensor
    gate_up_EGD: Tensor
    down_EDI: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    rows_MD: Tensor
    logits_TE: Tensor
    bias_E: Tensor
    grad_TD: Tensor

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The differentiable inputs of expert_mlp."""
        return self.x_TD, self.gate_up_EGD, self.down_EDI, self.weights_TK

    def leaves(self, needed: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Copies of `layer` of which those at `needed` require gradients."""
        x, gate_up, down, weights = (v.clone().requires_grad_(i in needed) for i, v in enumerate(self.layer))
        return x, gate_up, down, weights


@st.composite
def moe_cases(draw: st.DrawFn, max_experts: int = 512, max_dim: int = 96, dtypes: tuple = DTYPES) -> MoeCase:
    """Sizes with odd remainders, empty experts, zero tokens; E from 1 to 512, K from 1 to 16."""
    num_experts = draw(st.sampled_from([e for e in (1, 2, 3, 8, 61, 384, 512) if e <= max_experts]))
    return MoeCase(
        num_tokens=draw(st.sampled_from((0, 1, 5, 33, 70))),
        num_experts=num_experts,
        top_k=draw(st.integers(1, min(16, num_experts))),
        dim=draw(st.integers(1, max_dim)),
        width=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(dtypes)),
        routing=draw(st.sampled_from(("uniform", "one_expert", "skewed"))),
        seed=draw(st.integers(0, 1000)),
    )


@dataclass(frozen=True, kw_only=True)
class PatchCase:
    """Clips of patches and how they are pooled."""

    clips: tuple[tuple[int, int, int], ...]
    merge: tuple[int, int]
    dim: int
    dtype: torch.dtype
    grid_dtype: torch.dtype
    seed: int

    @property
    def num_patches(self) -> int:
        """P."""
        return sum(t * h * w for t, h, w in self.clips)

    @property
    def num_out(self) -> int:
        """Q."""
        return sum(h * w for _, h, w in self.clips) // (self.merge[0] * self.merge[1])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_PD, grid_thw_N3 and an upstream gradient (Q, C, D), the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((self.num_patches, self.dim), (self.num_out, self.merge[0] * self.merge[1], self.dim))
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes)
        return x, torch.tensor(self.clips, dtype=self.grid_dtype).view(-1, 3), grad


@st.composite
def patch_cases(draw: st.DrawFn, max_dim: int = 140, max_side: int = 4) -> PatchCase:
    """Clips of 1 to 6 frames and mixed sizes, none at all, square and oblong neighbourhoods, rows of any length."""
    merge = draw(st.sampled_from(((2, 2), (2, 2), (1, 1), (1, 3), (3, 2))))
    sides = st.integers(1, max_side)
    clips = draw(st.lists(st.tuples(st.sampled_from((1, 1, 2, 3, 4, 6)), sides, sides), max_size=5))
    return PatchCase(
        clips=tuple((t, i * merge[0], j * merge[1]) for t, i, j in clips),
        merge=merge,
        dim=draw(st.one_of(st.integers(0, max_dim), st.sampled_from((8, 32, 64, 128)))),
        dtype=draw(st.sampled_from(DTYPES)),
        grid_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        seed=draw(st.integers(0, 1000)),
    )


# Sizes beyond one tile, one panel, one block of the reduction and one chunk of rows.
LARGE_CASES = [
    MoeCase(num_tokens=t, num_experts=e, top_k=k, dim=d, width=i, dtype=dtype, routing="uniform", seed=t)
    for t, e, k, d, i in ((600, 4, 2, 128, 96), (90, 3, 2, 1500, 65), (40, 5, 3, 67, 1100), (1500, 2, 1, 48, 33))
    for dtype in DTYPES
]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """How far a result may be from the float64 one. For bf16: twice its rounding unit of 2^-8, for two roundings."""
    return {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-13}[dtype]


def first_difference(a: Tensor, b: Tensor) -> str:
    """Empty when bitwise equal, else the first coordinate that differs with both values."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = (a.contiguous().view(integers) != b.contiguous().view(integers)).nonzero()
    if not len(different):
        return ""
    at = tuple(different[0].tolist())
    return f"{len(different)} of {a.numel()} differ, first at {at}: {a[at].item()} against {b[at].item()}"


def check_routing(case: MoeCase, weights: Tensor, experts: Tensor, scale: float) -> None:
    """Raises unless the choice and the weights are those of the formula, for the case's logits and bias."""
    t = case.tensors()
    scores = t.logits_TE.double().sigmoid()
    keys = scores + t.bias_E.double()
    ids = experts.long()
    assert ((ids >= 0) & (ids < case.num_experts)).all()
    assert all(len(set(row)) == case.top_k for row in ids.tolist()), "an expert was chosen twice"
    best = keys.sort(dim=-1, descending=True).values[:, : case.top_k]
    # An expert whose key ties to within rounding may stand for another: compare keys, not ids.
    torch.testing.assert_close(keys.gather(1, ids), best, rtol=0, atol=5e-7)
    chosen = scores.gather(1, ids)
    expected = chosen / chosen.sum(-1, keepdim=True) * scale
    assert relative_error(weights, expected) <= (1e-13 if case.dtype == torch.float64 else 5e-7)
