"""Embedding and head with the vocabulary over 2 and 4 ranks: losses, logits and gradients are those of one process."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k25sys import ops
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DTypeError, GridError, ShapeError
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid, WeightGradStore
from k25sys.parallel.vocabulary import VocabParallelEmbedding, VocabParallelHead
from tests.parallel.parts import gather_parts
from tests.parallel.processes import run_ranks
from tests.parallel.tensor_cases import BOUNDS, Generator, gradients, grid_of, layout, part, relative_error, summed

CASES = 8
OBJECTIVE: dict[str, Any] = {"log_low": -0.5, "log_high": 0.7, "tau": 0.1}


def _check_embedding(g: Generator, grid: RankGrid, dtype: torch.dtype, main_grad: bool) -> None:
    """Bit by bit: every sum has one term that is not zero, and rows are added in the order of the tokens."""
    vocabulary, dim = g.size(1, 6), g.random.randint(1, 9)
    whole = nn.Embedding(vocabulary, dim).to(dtype)
    whole.weight.data.copy_(g.tensor(vocabulary, dim, dtype=dtype))
    ids_T = torch.randint(0, vocabulary, (g.size(0),), generator=g.torch)
    ids_T = ids_T.int() if g.random.random() < 0.5 else ids_T
    scatter = g.random.random() < 0.5
    ids = ids_T if scatter else ids_T.view(grid.size("tensor"), -1)
    twin = VocabParallelEmbedding(copy.deepcopy(whole), grid, scatter_output=scatter)
    if main_grad:
        twin.weight.main_grad = torch.zeros_like(twin.weight, dtype=torch.promote_types(dtype, torch.float32))  # pyright: ignore[reportAttributeAccessIssue]
    want, got = whole(ids), twin(ids)
    direction = g.tensor(*want.shape, dtype=dtype)
    want.backward(direction)
    which = "rows" if scatter else "all"
    got.backward(part(direction, which, grid))
    assert torch.equal(got, part(want, which, grid))
    assert torch.equal(gradients(twin)["weight"], _own(whole.weight.grad, grid))


def _own(whole: Tensor | None, grid: RankGrid) -> Tensor:
    assert whole is not None
    return part(whole, "rows", grid)


def _check_head(g: Generator, grid: RankGrid, dtype: torch.dtype) -> dict[str, float]:
    """Both losses from hidden states, and the policy loss from the logits of each rank's rows."""
    vocabulary, dim = g.size(2, 8), g.random.randint(4, 12)
    num_tokens = g.size(1, 90)  # up to two chunks of the op
    whole = g.fill(nn.Linear(dim, vocabulary, bias=False), dtype)
    hidden_TD = g.tensor(num_tokens, dim, dtype=dtype)
    targets_T = torch.randint(0, vocabulary, (num_tokens,), generator=g.torch)
    mask_T = torch.rand(num_tokens, generator=g.torch) < g.random.choice((0.0, 0.6, 1.0))
    wide = torch.promote_types(dtype, torch.float32)
    old_T, advantages_T = (g.tensor(num_tokens, dtype=wide) for _ in range(2))
    old_T = old_T - 2
    groups_T = torch.randint(0, min(3, num_tokens), (num_tokens,), generator=g.torch)
    tokens = (targets_T, old_T, advantages_T, mask_T)
    policy = {**OBJECTIVE, "group_ids_T": groups_T}
    wholes = {
        "cross entropy": lambda head, x: ops.linear_cross_entropy(x, head.weight, targets_T, mask_T, normalizer=7.0),
        "policy": lambda head, x: ops.linear_clipped_log_ratio_loss(x, head.weight, *tokens, **policy)[0],
        "logits": lambda head, x: ops.vocab_parallel_clipped_log_ratio_loss(head(x), *tokens, **policy)[0],
    }
    twins = {
        "cross entropy": lambda head, x: head.cross_entropy(x, targets_T, mask_T, normalizer=7.0),
        "policy": lambda head, x: head.clipped_log_ratio_loss(x, *tokens, **policy)[0],
        "logits": lambda head, x: ops.vocab_parallel_clipped_log_ratio_loss(
            head(x), *tokens, **policy, process_group=head.group, vocab_start=head.vocab_start
        )[0],
    }
    errors = {}
    spread = layout(whole.weight, 0)
    for name in wholes:
        head = copy.deepcopy(whole)
        x_TD, x_ND = hidden_TD.clone().requires_grad_(), part(hidden_TD, "rows", grid).clone().requires_grad_()
        want = wholes[name](head, x_TD)
        want.backward()
        twin = VocabParallelHead(copy.deepcopy(whole), grid, WeightGradStore())
        got = twins[name](twin, x_ND)
        got.backward()
        assert head.weight.grad is not None
        assert x_TD.grad is not None
        assert x_ND.grad is not None
        gathered = gather_parts(gradients(twin)["weight"], head.weight.shape, spread, grid)
        x_whole = gather_parts(x_ND.grad, x_TD.shape, _rows_of(x_TD), grid)
        errors |= {
            name: relative_error(got, want),
            f"{name}: head": relative_error(gathered, head.weight.grad),
            f"{name}: hidden": relative_error(x_whole, x_TD.grad),
        }
    return errors


def _rows_of(tensor: Tensor) -> ParameterLayout:
    return layout(tensor, 0)


def _check_all(ranks: int) -> dict[str, float]:
    grid = grid_of(ranks)
    worst: dict[str, float] = {}
    for dtype, bound in BOUNDS.items():
        for seed in range(CASES):
            _check_embedding(Generator(seed, ranks), grid, dtype, main_grad=seed % 2 == 1)
            errors = _check_head(Generator(seed, ranks), grid, dtype)
            assert max(errors.values()) <= bound, (dtype, seed, errors)
            key = str(dtype).removeprefix("torch.")
            worst[key] = max(worst.get(key, 0.0), *errors.values())
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
def test_embedding_and_head_equal_one_process(ranks: int) -> None:
    found = run_ranks(ranks, _check_all, ranks)
    print({key: f"{max(worst[key] for worst in found):.1e}" for key in found[0]})


def test_one_rank_equals_the_whole_layers_bit_by_bit() -> None:
    grid = RankGrid.create(GridSizes())
    for seed in range(CASES):
        _check_embedding(Generator(seed, 1), grid, torch.bfloat16, main_grad=False)
        assert set(_check_head(Generator(seed, 1), grid, torch.float32).values()) == {0.0}


def _main_grads(ranks: int) -> None:
    """The head's gradient is added to main_grad, as the others' are, and the bucket hears of it."""
    grid, calls = grid_of(ranks), []
    g = Generator(0, ranks)
    head = VocabParallelHead(g.fill(nn.Linear(4, 2 * ranks, bias=False), torch.float32), grid, WeightGradStore())
    main_grad = torch.ones_like(head.weight)
    head.weight.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
    head.weight.on_gradient = lambda: calls.append(1)  # pyright: ignore[reportAttributeAccessIssue]
    targets, mask = torch.zeros(2 * ranks, dtype=torch.int64), torch.ones(2 * ranks, dtype=torch.bool)
    x_ND = g.tensor(2, 4, dtype=torch.float32).requires_grad_()
    head.cross_entropy(x_ND, targets, mask).backward()
    assert head.weight.grad is None
    assert not torch.equal(main_grad, torch.ones_like(main_grad))
    assert calls == [1]
    # A head's gradient sums to zero over the vocabulary: softmax minus one.
    assert summed(main_grad - 1, grid.group("tensor")).sum(0).abs().max() < 1e-6


def test_gradients_of_the_head_land_in_main_grad() -> None:
    run_ranks(2, _main_grads, 2)


def _errors(ranks: int) -> None:
    grid, store = grid_of(ranks), WeightGradStore()
    with pytest.raises(GridError, match=r"VocabParallelEmbedding: num_embeddings: got 7 over 2 tensor ranks"):
        VocabParallelEmbedding(nn.Embedding(7, 4), grid, scatter_output=True)
    with pytest.raises(GridError, match=r"out_features: got 7 over 2 tensor ranks"):
        VocabParallelHead(nn.Linear(4, 7, bias=False), grid, store)
    embedding = VocabParallelEmbedding(nn.Embedding(8, 4), grid, scatter_output=True)
    with pytest.raises(ShapeError, match=r"VocabParallelEmbedding: T: got 3 rows over 2 ranks"):
        embedding(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"ids: got shape \(1, 2\), accepted \(T,\)"):
        embedding(torch.zeros(1, 2, dtype=torch.int64))
    for token in (-1, 8):
        with pytest.raises(ArgumentValueError, match=rf"ids: got token {token}, accepted 0 to 7"):
            embedding(torch.tensor([0, token]))
    with pytest.raises(DTypeError, match=r"ids: got torch.float32"):
        embedding(torch.zeros(2))


def test_wrong_sizes_and_tokens_are_refused() -> None:
    run_ranks(2, _errors, 2)
    grid, store = RankGrid.create(GridSizes()), WeightGradStore()
    with pytest.raises(ArgumentTypeError, match=r"VocabParallelEmbedding: embedding: got Linear"):
        VocabParallelEmbedding(nn.Linear(2, 2), grid, scatter_output=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentValueError, match=r"got padding_idx, max_norm or scale_grad_by_freq, accepted a plain"):
        VocabParallelEmbedding(nn.Embedding(4, 2, padding_idx=0), grid, scatter_output=True)
    with pytest.raises(ArgumentValueError, match=r"VocabParallelHead: layer: got a bias, accepted a head without bias"):
        VocabParallelHead(nn.Linear(2, 2), grid, store)
