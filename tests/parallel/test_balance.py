"""Balanced experts: the bias rule by hand and over ranks, the sequence loss by its equations, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from k25sys import ops
from k25sys.errors import ArgumentValueError, DTypeError, ShapeError
from k25sys.models.config import TextConfig
from k25sys.models.moe import Router
from k25sys.models.presets import preset
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.balance import (
    ExpertBalancer,
    add_sequence_loss,
    attach_loss,
    load_statistics,
    sequence_auxiliary_loss,
    update_expert_bias,
)
from tests.parallel.processes import run_ranks

NUM_EXPERTS, TOP_K = 8, 2


def test_an_overloaded_expert_becomes_less_likely() -> None:
    bias_E = torch.tensor([0.0, 0.5, -0.5, 0.0])
    load_E = update_expert_bias(bias_E, torch.tensor([6, 2, 3, 1], dtype=torch.int32), rate=0.125)
    assert load_E.tolist() == [6, 2, 3, 1]
    assert bias_E.tolist() == [-0.125, 0.625, -0.5, 0.125]


def test_each_layer_has_its_own_mean() -> None:
    bias_LE = torch.zeros(2, 2)
    update_expert_bias(bias_LE, torch.tensor([[1, 3], [500, 100]]), rate=1.0)
    assert bias_LE.tolist() == [[1.0, -1.0], [-1.0, 1.0]]


@pytest.mark.parametrize(
    ("bias", "tokens", "rate", "error", "text"),
    [
        (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), 0.1, DTypeError, "bias_E: got dtype"),
        (
            torch.zeros(4),
            torch.zeros(4),
            0.1,
            DTypeError,
            "tokens_per_expert_E: got dtype torch.float32, accepted int32",
        ),
        (torch.zeros(4), torch.zeros(3, dtype=torch.int64), 0.1, ShapeError, r"accepted (E=4)"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), float("nan"), ArgumentValueError, "rate: got nan"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), -1e-3, ArgumentValueError, "rate: got -0.001"),
        (torch.zeros(2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.int64), 0.1, ShapeError, "bias_E: got shape (2, 2, 2)"),
    ],
)
def test_a_bias_that_cannot_be_updated(bias: Tensor, tokens: Tensor, rate: float, error: type, text: str) -> None:
    with pytest.raises(error) as caught:
        update_expert_bias(bias, tokens, rate=rate)
    assert text in str(caught.value)


def test_load_statistics() -> None:
    statistics = load_statistics(torch.tensor([[2, 2, 2, 2], [8, 0, 4, 4]]), num_ranks=2)
    assert statistics == {"max_violation": 1.0, "rank_max_violation": 0.0, "idle_experts": 0.25}
    assert load_statistics(torch.tensor([3, 1, 0, 0]), num_ranks=2)["rank_max_violation"] == 1.0
    assert set(load_statistics(torch.zeros(4, dtype=torch.int64)).values()) == {0.0}
    with pytest.raises(ArgumentValueError, match="got 3 ranks, accepted a divisor of 4 experts"):
        load_statistics(torch.zeros(4), num_ranks=3)


def _router(seed: int) -> Router:
    generator = torch.Generator().manual_seed(seed)
    config: TextConfig = preset("tiny").text
    router = Router(config)
    nn.init.normal_(router.weight, std=config.hidden_size**-0.5, generator=generator)
    router.e_score_correction_bias.zero_()
    return router


def _skewed(router: Router, num_tokens: int, seed: int) -> Tensor:
    """Tokens that lie near a few experts' directions."""
    generator = torch.Generator().manual_seed(seed)
    noise_TD = torch.randn(num_tokens, router.weight.shape[1], generator=generator)
    return noise_TD + 1.5 * router.weight.detach()[:2].sum(0)


def test_biases_balance_a_skewed_router_and_do_not_weigh() -> None:
    router = _router(0)
    balancer = ExpertBalancer({"layers.1.mlp.gate": router}, RankGrid.create(GridSizes()), rate=1e-2)
    x_TD = _skewed(router, 512, 1)
    before = None
    for _ in range(150):
        router(x_TD)
        statistics = balancer.update()
        before = before or statistics
    after = statistics
    assert before is not None
    assert before["max_violation"] > 1.0
    assert after["max_violation"] < 0.25
    weights_TK, experts_TK = router(x_TD)
    scores_TK = (x_TD @ router.weight.T).sigmoid().gather(1, experts_TK.long())
    torch.testing.assert_close(weights_TK, scores_TK / scores_TK.sum(1, keepdim=True) * router.scale)


def test_only_training_counts_and_a_step_starts_anew() -> None:
    router, grid = _router(0), RankGrid.create(GridSizes())
    balancer = ExpertBalancer({"gate": router}, grid, rate=0.5)
    x_TD = _skewed(router, 64, 1)
    router.eval()
    router(x_TD)
    assert balancer.update()["max_violation"] == 0.0
    assert not router.e_score_correction_bias.any()
    router.train()
    router(x_TD)
    assert balancer.update()["max_violation"] > 0
    moved_E = router.e_score_correction_bias.clone()
    assert moved_E.any()
    balancer.update()
    torch.testing.assert_close(router.e_score_correction_bias, moved_E, rtol=0, atol=0)
    router(x_TD)
    balancer.forget()
    balancer.update()
    torch.testing.assert_close(router.e_score_correction_bias, moved_E, rtol=0, atol=0)
    assert ExpertBalancer({}, grid, rate=0.5).update() == {}


def test_routers_of_other_widths_are_refused() -> None:
    other = nn.Module()
    other.register_buffer("e_score_correction_bias", torch.zeros(3))
    with pytest.raises(ShapeError, match=r"b\.e_score_correction_bias: got \(3,\), accepted"):
        ExpertBalancer({"a": _router(0), "b": other}, RankGrid.create(GridSizes()), rate=1e-3)


def _equations_17_to_20(logits_TE: Tensor, top_k: int, alpha: float) -> Tensor:
    """The loss of one sequence, index by index."""
    num_tokens, num_experts = logits_TE.shape
    s_TE = logits_TE.sigmoid()
    loss = s_TE.new_zeros(())
    for e in range(num_experts):
        chosen = sum(e in row.topk(top_k).indices for row in s_TE)
        f = num_experts / (top_k * num_tokens) * chosen
        p = sum(row[e] / row.sum() for row in s_TE) / num_tokens
        loss = loss + alpha * f * p
    return loss


def _packed(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(sum(lengths), NUM_EXPERTS, generator=generator, dtype=torch.float64)
    return logits_TE, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, NUM_EXPERTS))
def test_the_sequence_loss_is_that_of_the_equations(lengths: list[int], top_k: int) -> None:
    logits_TE, sequences_T = _packed(lengths)
    logits_TE.requires_grad_()
    arguments: dict[str, Any] = {"top_k": top_k, "alpha": 0.01}
    loss = sequence_auxiliary_loss(logits_TE, sequences_T, len(lengths), normalizer=3.0, **arguments)
    expected = logits_TE.sum() * 0
    for part_TE in logits_TE.split(lengths):
        if len(part_TE):
            expected = expected + _equations_17_to_20(part_TE, **arguments) / 3.0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,), (expected_grad,) = torch.autograd.grad(loss, logits_TE), torch.autograd.grad(expected, logits_TE)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-16)


def test_the_sequence_loss_has_the_gradient_of_its_numbers() -> None:
    logits_TE, sequences_T = _packed([5, 0, 3])
    assert torch.autograd.gradcheck(
        lambda logits: sequence_auxiliary_loss(logits, sequences_T, 3, top_k=TOP_K, alpha=1.0, normalizer=2.0),
        logits_TE.requires_grad_(),
    )


def test_an_attached_loss_reaches_the_backward() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = attach_loss(x * w, (w**2).sum())
    assert torch.equal(y, x * w)
    y.backward(torch.ones(3, dtype=torch.float64))
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.detach() + 2 * w.detach())
    torch.testing.assert_close(x.grad, w.detach())


def test_a_router_with_a_sequence_loss() -> None:
    router, grid = _router(0).double(), RankGrid.create(GridSizes())
    x_TD = _skewed(router, 12, 1).double()
    sequences_T = torch.arange(3).repeat_interleave(4)
    routed = torch.autograd.grad(router(x_TD)[0].square().sum(), router.weight)[0]
    loss = sequence_auxiliary_loss(
        x_TD @ router.weight.T, sequences_T, 3, top_k=router.top_k, alpha=0.1, normalizer=6.0
    )
    expected = routed + torch.autograd.grad(loss, router.weight)[0]
    handle = add_sequence_loss(router, lambda: (sequences_T, 3, 6.0), alpha=0.1, grid=grid)
    weights_TK, _ = router(x_TD)
    torch.testing.assert_close(torch.autograd.grad(weights_TK.square().sum(), router.weight)[0], expected)
    router.eval()
    assert torch.equal(torch.autograd.grad(router(x_TD)[0].square().sum(), router.weight)[0], routed)
    router.train()
    handle.remove()
    assert torch.equal(torch.autograd.grad(router(x_TD)[0].square().sum(), router.weight)[0], routed)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sequences_T": torch.tensor([0, 2])}, IndexError, "sequences_T: got 0 to 2, accepted 0 to 1"),
        ({"sequences_T": torch.tensor([-1, 0])}, IndexError, "got -1 to 0"),
        ({"sequences_T": torch.tensor([0])}, ShapeError, "accepted (T=2)"),
        ({"logits_TE": torch.zeros(2, NUM_EXPERTS, dtype=torch.float16)}, DTypeError, "logits_TE: got dtype"),
        ({"normalizer": 0.0}, ArgumentValueError, "normalizer > 0"),
        ({"alpha": float("nan")}, ArgumentValueError, "alpha nan"),
        ({"top_k": 9}, ArgumentValueError, "top_k: got 9, accepted 1 to 8"),
    ],
)
def test_a_sequence_loss_that_cannot_be_computed(changes: dict[str, Any], error: type, text: str) -> None:
    arguments: dict[str, Any] = {
        "logits_TE": torch.zeros(2, NUM_EXPERTS), "sequences_T": torch.tensor([0, 1]), "num_sequences": 2,
        "top_k": TOP_K, "alpha": 0.1, "normalizer": 1.0,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        sequence_auxiliary_loss(**(arguments | changes))
    assert text in str(caught.value)


def _over_ranks() -> dict[str, Any]:
    sizes = GridSizes(data=2, context=2, tensor=2, expert=4)
    grid = RankGrid.create(sizes)
    router = _router(0)
    balancer = ExpertBalancer({"a": router, "b": router}, grid, rate=1e-3)
    parts = [_skewed(router, 3 + rank, rank) for rank in range(sizes.world_size)]
    router(parts[grid.rank])
    statistics = balancer.update()
    # Each data rank has sequences of its own, spread over context and tensor.
    logits_TE, sequences_T = _packed([7, 0, 6, 9], seed=grid.index("data"))
    place = 2 * grid.index("context") + grid.index("tensor")
    own = torch.arange(len(logits_TE)) % 5 % 4 == place
    mine_TE = logits_TE[own].requires_grad_()
    arguments: dict[str, Any] = {"top_k": TOP_K, "alpha": 0.01, "normalizer": 8.0}
    loss = sequence_auxiliary_loss(mine_TE, sequences_T[own], 4, grid=grid, **arguments)
    loss.backward()
    whole_TE = logits_TE.clone().requires_grad_()
    whole = sequence_auxiliary_loss(whole_TE, sequences_T, 4, **arguments)
    whole.backward()
    assert mine_TE.grad is not None
    assert whole_TE.grad is not None
    torch.testing.assert_close(mine_TE.grad, whole_TE.grad[own], rtol=1e-12, atol=0)
    return {
        "statistics": statistics, "bias": router.e_score_correction_bias.tolist(), "loss": float(loss.detach()),
        "whole": float(whole.detach()), "data": grid.index("data"),
    }  # fmt: skip


def test_loads_and_losses_add_up_over_ranks() -> None:
    results = run_ranks(8, _over_ranks)
    router = _router(0)
    x_TD = torch.cat([_skewed(router, 3 + rank, rank) for rank in range(8)])
    counts_E = ops.plan_dispatch(router(x_TD)[1], len(router.weight)).tokens_per_expert_E
    bias_LE = torch.zeros(2, len(counts_E))
    expected = load_statistics(update_expert_bias(bias_LE, counts_E.expand(2, -1), rate=1e-3), num_ranks=4)
    for result in results:
        assert result["statistics"] == expected
        assert result["bias"] == bias_LE[0].tolist()
    for data in (0, 1):
        parts = [result for result in results if result["data"] == data]
        assert sum(part["loss"] for part in parts) == pytest.approx(parts[0]["whole"], rel=1e-12)
