"""The policy loss and cross-entropy against autograd in float64, on every instruction set."""

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import first_difference, relative_error

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]
generated = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BOUNDS: dict[str, Any] = {"log_low": -0.5, "log_high": 0.4, "tau": 0.1}
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """Tokens of a few groups, some without loss, their log-ratios on both sides of the bounds."""

    num_tokens: int
    vocab: int
    dim: int
    dtype: torch.dtype
    with_loss: float
    seed: int
    penalty_on: str = "all"
    normalizer: str | float = "group"
    spread: float = 1.0

    def layer(self) -> tuple[Tensor, Tensor]:
        """hidden_TD and head_VD."""
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.num_tokens, self.dim, generator=generator) * self.spread
        head = torch.randn(self.vocab, self.dim, generator=generator) / max(self.dim, 1) ** 0.5
        return hidden.to(self.dtype), head.to(self.dtype)

    def tokens(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """targets_T, old_logprobs_T, advantages_T and loss_mask_T; garbage where there is no loss."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        mask = torch.rand(self.num_tokens, generator=generator) < self.with_loss
        targets = torch.randint(0, self.vocab, (self.num_tokens,), generator=generator)
        logprobs = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        old = logprobs + 0.6 * torch.randn(self.num_tokens, generator=generator).double()
        advantages = torch.randn(self.num_tokens, generator=generator).double()
        scalar = torch.float64 if self.dtype == torch.float64 else torch.float32
        old, advantages = old.to(scalar), advantages.to(scalar)
        old[~mask], advantages[~mask], targets[~mask] = float("nan"), float("inf"), -(2**62)
        return targets, old, advantages, mask

    def options(self) -> dict[str, Any]:
        """The keywords of every entry point."""
        groups = torch.arange(self.num_tokens) // 5
        return {**BOUNDS, "penalty_on": self.penalty_on, "normalizer": self.normalizer, "group_ids_T": groups}


cases = st.builds(
    LossCase,
    num_tokens=st.integers(0, 20) | st.sampled_from((127, 260)),
    vocab=st.integers(1, 70) | st.sampled_from((192, 401)),
    dim=st.integers(1, 40),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    with_loss=st.sampled_from((0.0, 0.3, 1.0)),
    seed=st.integers(0, 1000),
    penalty_on=st.sampled_from(("all", "kept")),
    normalizer=st.sampled_from(("group", "batch", 7.5)),
)


def loss_and_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The loss and the gradients of the inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    loss = function(*leaves)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_close(ours: list[Tensor], exact: list[Tensor], limit: float) -> None:
    """Relative to the largest value of each; a loss near 0 is a difference of larger terms."""
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(a, b) <= limit
    assert abs(float(ours[0]) - float(exact[0])) <= limit * max(1.0, abs(float(exact[0])))


def near_a_bound(case: LossCase, logits: Tensor) -> bool:
    """Whether rounding may put a log-ratio on the other side of a bound."""
    targets, old, _, mask = case.tokens(logits)
    logprobs = logits.double().log_softmax(-1)[mask].gather(1, targets[mask][:, None])[:, 0]
    log_ratio = logprobs - old[mask].double()
    margin = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-4}[case.dtype]
    return any(bool(((log_ratio - BOUNDS[bound]).abs() < margin).any()) for bound in ("log_low", "log_high"))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    native._C.cpu.set_isa(request.param)
    yield request.param
    native._C.cpu.set_isa("auto")


@generated
@given(case=cases)
def test_from_logprobs(case: LossCase) -> None:
    hidden, head = (value.double() for value in case.layer())
    targets, *tokens = case.tokens(hidden @ head.T)
    exact_logprobs = (hidden @ head.T).log_softmax(-1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    if near_a_bound(case, hidden @ head.T):
        return
    logprobs = exact_logprobs.to(case.dtype)
    ours = loss_and_gradients(lambda x: ops.clipped_log_ratio_loss(x, *tokens, **case.options()), logprobs)
    old, advantages = (value.double() for value in tokens[:2])
    reference = lambda x: ops.reference_clipped_log_ratio_loss(x, old, advantages, tokens[2], **case.options())  # noqa: E731
    if case.dtype != torch.bfloat16:  # a rounded log-probability may be out of bounds
        assert_close(ours, loss_and_gradients(reference, logprobs.double()), LIMITS[case.dtype])
    assert not ours[1][~tokens[2]].any()


@generated
@given(case=cases)
def test_from_logits(isa: str, case: LossCase) -> None:
    hidden, head = case.layer()
    logits = (hidden.double() @ head.double().T).to(case.dtype)
    targets, old, advantages, mask = case.tokens(logits)
    if near_a_bound(case, logits):
        return
    options = case.options()
    ours = loss_and_gradients(
        lambda x: ops.vocab_parallel_clipped_log_ratio_loss(x, targets, old, advantages, mask, **options), logits
    )
    exact = loss_and_gradients(
        lambda x: ops.reference_vocab_parallel_clipped_log_ratio_loss(
            x, targets, old.double(), advantages.double(), mask, **options
        ),
        logits.double(),
    )
    assert_close(ours, exact, LIMITS[case.dtype])
    assert not ours[1][~mask].any()


@generated
@given(case=cases)
def test_from_hidden_states(isa: str, case: LossCase) -> None:
    hidden, head = case.layer()
    logits = hidden.double() @ head.double().T
    targets, old, advantages, mask = case.tokens(logits)
    if near_a_bound(case, logits):
        return
    options = case.options()
    ours = loss_and_gradients(
        lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, targets, old, advantages, mask, **options), hidden, head
    )
    exact = loss_and_gradients(
        lambda h, w: ops.reference_linear_clipped_log_ratio_loss(
            h, w, targets, old.double(), advantages.double(), mask, **options
        ),
        hidden.double(), head.double(),
    )  # fmt: skip
    assert_close(ours, exact, LIMITS[case.dtype])


@generated
@given(case=cases)
def test_linear_cross_entropy(isa: str, case: LossCase) -> None:
    hidden, head = case.layer()
    targets, _, _, mask = case.tokens(hidden.double() @ head.double().T)
    ours = loss_and_gradients(lambda h, w: ops.linear_cross_entropy(h, w, targets, mask), hidden, head)
    exact = loss_and_gradients(
        lambda h, w: ops.reference_linear_cross_entropy(h, w, targets, mask), hidden.double(), head.double()
    )
    assert_close(ours, exact, LIMITS[case.dtype])


def test_closed_form() -> None:
    """Inside, above, below the bounds, for both signs of the advantage."""
    log_ratio = torch.tensor([0.0, 0.3, 0.9, -0.9, 0.9, -0.9], dtype=torch.float64)
    advantages = torch.tensor([2.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    old, mask = torch.full_like(log_ratio, -1.5), torch.ones(6, dtype=torch.bool)
    inside = torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)
    for penalty_on, penalty in (("all", torch.ones_like(inside)), ("kept", inside)):
        loss, slope = loss_and_gradients(
            lambda x, kind=penalty_on: ops.clipped_log_ratio_loss(x, old, advantages, mask, **BOUNDS, penalty_on=kind),
            log_ratio + old,
        )
        clipped = log_ratio.clamp(-0.5, 0.4).exp()
        assert math.isclose(loss, -(clipped * advantages - 0.1 * penalty * log_ratio**2).sum() / 6, rel_tol=1e-12)
        expected = -(inside * advantages * log_ratio.exp() - 0.2 * penalty * log_ratio) / 6
        assert relative_error(slope, expected) <= 1e-12


def test_metrics() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    targets, mask = torch.tensor([0, 3, 8, 1]), torch.tensor([True, True, False, True])
    log_ratio = torch.tensor([0.1, 0.9, 5.0, -0.2], dtype=torch.float64)
    old = logprobs.gather(1, targets[:, None])[:, 0] - log_ratio
    _, metrics = ops.vocab_parallel_clipped_log_ratio_loss(logits, targets, old, torch.ones(4), mask, **BOUNDS)
    kept = log_ratio[mask]
    entropy = -(logprobs.exp() * logprobs).sum(-1)[mask].mean()
    expected = {
        "fraction_masked": 1 / 3, "log_ratio_abs_mean": 0.4, "log_ratio_abs_max": 0.9, "num_loss_tokens": 3,
        "kl": float((kept.exp() - 1 - kept).mean()), "entropy": float(entropy),
    }  # fmt: skip
    assert {name: round(float(value), 9) for name, value in metrics.items()} == {
        name: round(value, 9) for name, value in expected.items()
    }


def test_extremes_of_logits(isa: str) -> None:
    """Forbidden tokens (-inf), a certain target, differences that overflow exp."""
    logits = torch.tensor([[0.0, -math.inf, 1.0], [1e4, -1e4, 0.0], [-3e4, 3e4, 2.9e4], [88.0, 177.0, -1.0]])
    targets, mask = torch.tensor([2, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    old, advantages = torch.zeros(4), torch.ones(4)
    ours = loss_and_gradients(
        lambda x: ops.vocab_parallel_clipped_log_ratio_loss(x, targets, old, advantages, mask, **BOUNDS), logits
    )
    exact = loss_and_gradients(
        lambda x: ops.reference_vocab_parallel_clipped_log_ratio_loss(x, targets, old, advantages, mask, **BOUNDS),
        logits.double(),
    )
    assert_close(ours, exact, 1e-6)


def test_nothing_to_learn() -> None:
    hidden, head = torch.randn(6, 4), torch.randn(11, 4)
    targets, zeros = torch.zeros(6, dtype=torch.long), torch.zeros(6)
    old = (hidden @ head.T).log_softmax(-1)[:, 0]
    for advantages, mask in ((zeros, torch.ones(6).bool()), (torch.ones(6), torch.zeros(6).bool())):
        loss, *grads = loss_and_gradients(
            lambda h, w, a=advantages, m=mask: ops.linear_clipped_log_ratio_loss(h, w, targets, old, a, m, **BOUNDS),
            hidden, head,
        )  # fmt: skip
        assert abs(loss) < 1e-12
        assert all(float(grad.abs().max()) < 1e-6 for grad in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["logprobs_T", "old_logprobs_T", "advantages_T"])
def test_a_number_that_is_not_finite_is_named(argument: str, value: float) -> None:
    arguments = {name: torch.zeros(3) for name in ("logprobs_T", "old_logprobs_T", "advantages_T")}
    arguments[argument][1] = value
    for mask, message in ((torch.ones(3).bool(), f"clipped_log_ratio_loss: {argument}\\[1\\]: got -?(nan|inf)"),):
        with pytest.raises(ValueError, match=message):
            ops.clipped_log_ratio_loss(**arguments, loss_mask_T=mask, **BOUNDS)
    masked = torch.tensor([True, False, True])
    assert float(ops.clipped_log_ratio_loss(**arguments, loss_mask_T=masked, **BOUNDS)[0]) == 0


@pytest.mark.parametrize("target", [-1, 9, 2**62])
def test_a_target_outside_the_vocabulary_is_named(target: int) -> None:
    targets, mask, zeros = torch.tensor([0, target]), torch.ones(2).bool(), torch.zeros(2)
    with pytest.raises(IndexError, match=r"vocab_parallel_clipped_log_ratio_loss: targets_T\[1\]: got"):
        ops.vocab_parallel_clipped_log_ratio_loss(torch.zeros(2, 9), targets, zeros, zeros, mask, **BOUNDS)
    with pytest.raises(IndexError, match=r"linear_clipped_log_ratio_loss: targets_T\[1\]: got"):
        ops.linear_clipped_log_ratio_loss(torch.zeros(2, 4), torch.zeros(9, 4), targets, zeros, zeros, mask, **BOUNDS)


def test_an_upstream_gradient_scales() -> None:
    case = LossCase(num_tokens=9, vocab=30, dim=8, dtype=torch.float64, with_loss=0.7, seed=2)
    hidden, head = case.layer()
    targets, *tokens = case.tokens(hidden @ head.T)
    for entry in (
        lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, targets, *tokens, **BOUNDS)[0],
        lambda h, w: ops.vocab_parallel_clipped_log_ratio_loss(h @ w.T, targets, *tokens, **BOUNDS)[0],
    ):
        plain = loss_and_gradients(entry, hidden, head)
        tripled = loss_and_gradients(lambda h, w, run=entry: 3 * run(h, w), hidden, head)
        assert_close(tripled, [3 * value for value in plain], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = LossCase(num_tokens=150, vocab=700, dim=300, dtype=dtype, with_loss=1.0, seed=3)
    hidden, head = case.layer()
    targets, *tokens = case.tokens(hidden.double() @ head.double().T)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                loss_and_gradients(
                    lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, targets, *tokens, **BOUNDS), hidden, head
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert [first_difference(a, b) for a, b in zip(results[0], other, strict=True)] == [""] * 3


def test_the_sum_over_chunks_keeps_float32() -> None:
    """A head gradient in bf16 over many chunks is rounded once, not once a chunk."""
    case = LossCase(num_tokens=1300, vocab=24, dim=16, dtype=torch.bfloat16, with_loss=1.0, seed=1)
    hidden, head = case.layer()
    targets, _, _, mask = case.tokens(hidden.double() @ head.double().T)
    ours = loss_and_gradients(lambda h, w: ops.linear_cross_entropy(h, w, targets, mask), hidden, head)
    exact = loss_and_gradients(
        lambda h, w: ops.reference_linear_cross_entropy(h, w, targets, mask), hidden.double(), head.double()
    )
    assert relative_error(ours[2], exact[2]) <= 2**-8


def test_gradcheck_and_opcheck() -> None:
    case = LossCase(num_tokens=6, vocab=7, dim=3, dtype=torch.float64, with_loss=0.7, seed=5)
    hidden, head = (value.requires_grad_() for value in case.layer())
    logits = (hidden @ head.T).detach().requires_grad_()
    targets, old, advantages, mask = case.tokens(logits.detach())
    tokens = (targets, old, advantages, mask)
    check = torch.autograd.gradcheck
    options = case.options()
    assert check(lambda x: ops.vocab_parallel_clipped_log_ratio_loss(x, *tokens, **options)[0], (logits,))
    assert check(lambda h, w: ops.linear_clipped_log_ratio_loss(h, w, *tokens, **options)[0], (hidden, head))
    logprobs = old.nan_to_num(0).requires_grad_()
    assert check(lambda x: ops.clipped_log_ratio_loss(x, *tokens[1:], **options)[0], (logprobs,))
    weights = mask.double() / 3
    constants = (0, -0.5, 0.4, 0.1, True)
    k25 = torch.ops.k25
    torch.library.opcheck(k25.token_losses.default, (logprobs, old, advantages, weights, *constants))
    rows = (targets, old, advantages, weights, *constants, 0)
    torch.library.opcheck(k25.loss_rows.default, (logits, *rows, False))
    torch.library.opcheck(
        k25.linear_loss.default, (hidden.detach(), head.detach(), *rows, [True, True]),
    )  # fmt: skip


def test_torch_compile() -> None:
    case = LossCase(num_tokens=9, vocab=30, dim=8, dtype=torch.float32, with_loss=0.7, seed=2)
    hidden, head = case.layer()
    targets, *tokens = case.tokens(hidden @ head.T)

    def both(h: Tensor, w: Tensor) -> Tensor:
        linear = ops.linear_clipped_log_ratio_loss(h, w, targets, *tokens, **BOUNDS)[0]
        return linear + ops.vocab_parallel_clipped_log_ratio_loss(h @ w.T, targets, *tokens, **BOUNDS)[0]

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_close(loss_and_gradients(compiled, hidden, head), loss_and_gradients(both, hidden, head), 1e-5)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("world", "dtype"), list(itertools.product((2, 4), ("float32", "float64", "bfloat16"))))
def test_a_sharded_vocabulary_gives_the_same_loss_and_gradients(world: int, dtype: str, tmp_path: Any) -> None:
    command = [sys.executable, "-m", "tests.ops.sharded_losses", str(world), dtype, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees") == world
