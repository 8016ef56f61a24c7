"""Generation: log-probabilities against a teacher-forced forward, sampling, stopping, and what is computed once."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys.models import KimiK25, Sample, generate
from k25sys.models.generate import _choose
from k25sys.models.latent_cache import LayerCache
from tests.models.cases import MEDIA_PAD, ModelCase, model_cases, plain_case


@dataclass
class Prompts:
    """Ragged prompts and the media of each."""

    ids: list[list[int]]
    clips: list[list[int]]  # numbers of the clips of each prompt
    pixels: Tensor | None
    grid: Tensor | None

    def media(self, prompt: int) -> tuple[Tensor | None, Tensor | None]:
        """The pixels and grid of one prompt."""
        if self.pixels is None or self.grid is None or not self.clips[prompt]:
            return None, None
        parts = self.pixels.split(self.grid.prod(1).tolist())
        return torch.cat([parts[i] for i in self.clips[prompt]]), self.grid[self.clips[prompt]]


def ragged_prompts(case: ModelCase, num_prompts: int) -> Prompts:
    """Prompts of 1 to 12 tokens of text, and the clips of `case` dealt out in order."""
    generator = torch.Generator().manual_seed(case.seed)
    _, pixels, grid = case.tensors()
    owners = torch.randint(0, num_prompts, (len(case.clips),), generator=generator).sort().values.tolist()
    ids, clips = [], []
    for prompt in range(num_prompts):
        length = int(torch.randint(1, 13, (), generator=generator))
        text = torch.randint(0, MEDIA_PAD, (length,), generator=generator).tolist()
        mine = [i for i, owner in enumerate(owners) if owner == prompt]
        pads = [MEDIA_PAD] * sum(case.clips[i][1] * case.clips[i][2] // 4 for i in mine)
        ids.append(text[: length // 2] + pads + text[length // 2 :])
        clips.append(mine)
    return Prompts(ids, clips, pixels, grid)


def teacher_forced(model: KimiK25, prompts: Prompts, prompt: int, sample: Sample) -> Tensor:
    """(new tokens, V): log-probabilities by one forward over prompt and continuation."""
    ids = prompts.ids[prompt]
    logits = model(torch.tensor([ids + sample.token_ids]), *prompts.media(prompt))
    return logits[0].log_softmax(-1)[len(ids) - 1 : -1]


@settings(max_examples=40)
@given(
    case=model_cases(), num_prompts=st.integers(1, 4), num_samples=st.integers(1, 3),
    temperature=st.sampled_from((0.0, 0.7, 1.0, 1.6)), top_p=st.sampled_from((0.5, 1.0)),
)  # fmt: skip
def test_logprobs_equal_a_teacher_forced_forward(
    case: ModelCase, num_prompts: int, num_samples: int, temperature: float, top_p: float
) -> None:
    model, prompts = case.model(), ragged_prompts(case, num_prompts)
    samples = generate(
        model, prompts.ids, max_new_tokens=6, temperature=temperature, top_p=top_p, stop_ids=range(20, 28),
        generator=torch.Generator().manual_seed(case.seed), pixel_values=prompts.pixels, grid_thw=prompts.grid,
        num_samples=num_samples,
    )  # fmt: skip
    assert len(samples) == num_prompts * num_samples
    for i, sample in enumerate(samples):
        with torch.no_grad():
            logprobs = teacher_forced(model, prompts, i // num_samples, sample)
        tokens = torch.tensor(sample.token_ids)
        want = logprobs.gather(1, tokens[:, None])[:, 0]
        assert (want - torch.tensor(sample.logprobs)).abs().max() <= 1e-5
        if temperature == 0:
            logprobs[:, MEDIA_PAD] = float("-inf")
            assert torch.equal(logprobs.argmax(-1), tokens)
        ended = [token in range(20, 28) for token in sample.token_ids]
        assert not any(ended[:-1])
        assert ended[-1] or len(sample.token_ids) == 6


def test_a_long_generation_outgrows_the_first_cache() -> None:
    case = plain_case()
    model, prompts = case.model(), ragged_prompts(case, 3)
    samples = generate(
        model, prompts.ids, max_new_tokens=80, temperature=1.3, stop_ids=(5,), pixel_values=prompts.pixels,
        grid_thw=prompts.grid, num_samples=2,
    )  # fmt: skip
    lengths = [len(sample.token_ids) for sample in samples]
    assert max(lengths) > 64
    assert min(lengths) < 64
    for i, sample in enumerate(samples):
        with torch.no_grad():
            logprobs = teacher_forced(model, prompts, i // 2, sample)
        want = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert (want - torch.tensor(sample.logprobs)).abs().max() <= 1e-5


def test_prompts_and_media_are_computed_once_for_all_samples_and_cached_compressed() -> None:
    case = plain_case()
    model, prompts = case.model(), ragged_prompts(case, 3)
    rows: dict[str, list[int]] = {"layer": [], "vision": [], "expand": []}

    def count(name: str) -> Any:
        return lambda _module, inputs: rows[name].append(len(inputs[0]))

    layer: Any = model.language_model.model.layers["1"]
    layer.input_layernorm.register_forward_pre_hook(count("layer"))
    layer.self_attn.kv_b_proj.register_forward_pre_hook(count("expand"))
    model.vision_tower.register_forward_pre_hook(count("vision"))
    stored: list[tuple[int, ...]] = []
    store = LayerCache.store_prompts

    def record(self: LayerCache, entries_TE: Tensor, documents: Any) -> None:
        stored.append(tuple(entries_TE.shape))
        store(self, entries_TE, documents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerCache, "store_prompts", record)
        generate(
            model, prompts.ids, max_new_tokens=4, stop_ids=(), pixel_values=prompts.pixels, grid_thw=prompts.grid,
            num_samples=5,
        )  # fmt: skip
    num_tokens = sum(map(len, prompts.ids))
    assert rows["layer"] == [num_tokens, 15, 15, 15]
    assert rows["expand"] == [num_tokens], "keys and values were expanded while decoding"
    assert len(rows["vision"]) == 1
    assert stored == [(num_tokens, case.kv_rank + case.rope)] * case.layers


def test_ended_samples_are_no_longer_computed() -> None:
    case = plain_case(clips=())
    model = case.model()
    batches: list[int] = []
    model.language_model.lm_head.register_forward_pre_hook(lambda _module, inputs: batches.append(len(inputs[0])))
    samples = generate(model, [[1, 2], [3]], max_new_tokens=12, stop_ids=range(40), num_samples=8)
    lengths = [len(sample.token_ids) for sample in samples]
    # The head sees the prompts once, then at each step the samples that are longer than what has been sampled.
    assert batches == [2] + [n for step in range(1, 12) if (n := sum(length > step for length in lengths))]


def test_ended_samples_and_prompts_leave_the_attention() -> None:
    """What the products of attention hold: rows of the samples that run, prompts that have one, no more padding."""
    case = plain_case(clips=())
    model, lengths = case.model(), (3, 30, 8)
    held: list[tuple[int, ...]] = []
    attend = LayerCache.attend

    def record(self: LayerCache, q_AHE: Tensor, *, scale: float) -> Tensor:
        owner = self._owner
        held.append((*self._prompts_PLE.shape[:2], self._sampled_ASE.shape[0], owner.by_prompt(q_AHE).shape[1]))
        return attend(self, q_AHE, scale=scale)

    prompts = [[7] * length for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerCache, "attend", record)
        samples = generate(
            model, prompts, max_new_tokens=24, stop_ids=range(20), num_samples=4,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
    ends = torch.tensor([len(sample.token_ids) for sample in samples]).view(3, 4)
    expected = []
    for step in range(1, int(ends.max())):
        running = (ends > step).sum(1).tolist()
        alive = [length for length, count in zip(lengths, running, strict=True) if count]
        expected += [(len(alive), max(alive), sum(running), max(running) * case.heads)] * case.layers
    assert held == expected
    assert {row[0] for row in held} == {1, 2, 3}


def test_random_choices_follow_the_generator() -> None:
    model = plain_case(clips=()).model()

    def run(seed: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, [[1, 2, 3], [4]], max_new_tokens=8, generator=generator, num_samples=2)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(1)[0] != run(1)[1], "two samples of a prompt are copies"


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.75), (1.0, 0.6), (1.0, 1e-9)])
def test_tokens_are_drawn_with_the_probabilities_of_temperature_and_top_p(temperature: float, top_p: float) -> None:
    logits = torch.tensor([0.3, 1.0, -0.5, 2.0, 1.9])
    want = (logits / temperature).softmax(-1)
    order = want.argsort(descending=True)
    kept, total = [], 0.0
    for token in order.tolist():
        if total >= top_p:
            break
        kept.append(token)
        total += want[token].item()
    want = torch.where(torch.isin(torch.arange(5), torch.tensor(kept)), want, torch.zeros(()))
    want = want / want.sum()
    draws = 40000
    tokens = _choose(logits.expand(draws, 5), temperature, top_p, torch.Generator().manual_seed(0))
    counts = tokens.bincount(minlength=5)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(kept)
    five_deviations = 5 * (want * (1 - want) / draws).sqrt() + 1e-9
    assert ((counts / draws - want).abs() <= five_deviations).all()


def test_media_pad_is_never_sampled() -> None:
    model = plain_case(clips=()).model()
    samples = generate(model, [[1]], max_new_tokens=3, stop_ids=(), num_samples=2000, temperature=100.0)
    counts = torch.tensor([sample.token_ids for sample in samples]).flatten().bincount(minlength=64)
    assert counts[MEDIA_PAD] == 0
    assert (counts > 0).sum() == 63


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[3e4, 3.1e4, -3e4]])
    for temperature in (1e-320, 1e-30, 1e-6, 0.0):
        assert _choose(logits, temperature, 0.9, None).tolist() == [1]


def test_training_goes_on_after_generating() -> None:
    case = plain_case()
    model, prompts = case.model(), ragged_prompts(case, 1)
    generate(model, prompts.ids, max_new_tokens=3, pixel_values=prompts.pixels, grid_thw=prompts.grid)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model(*case.tensors()).sum().backward()
    assert math.isfinite(sum(p.grad.sum().item() for p in model.parameters() if p.grad is not None))


def test_bfloat16_generates_close_to_its_own_forward() -> None:
    case = plain_case(clips=())
    model = case.model().bfloat16()
    prompts = ragged_prompts(case, 3)
    for i, sample in enumerate(generate(model, prompts.ids, max_new_tokens=10, stop_ids=())):
        with torch.no_grad():
            logprobs = teacher_forced(model, prompts, i, sample).float()
        want = logprobs.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert (want - torch.tensor(sample.logprobs)).abs().median() < 0.1


@pytest.mark.parametrize(
    ("arguments", "kind", "error"),
    [
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\]: got no tokens"),
        ({"prompts": [[64]]}, ValueError, r"prompts\[0\]: got token 64, accepted 0 to 63"),
        ({"prompts": [["a"]]}, TypeError, r"prompts\[0\]: got 'a', accepted token ids"),
        (
            {"prompts": [[1] * 510]},
            ValueError,
            "got 510 tokens and 4 new ones, accepted up to max_position_embeddings 512",
        ),
        ({"prompts": [[MEDIA_PAD]]}, ValueError, r"1 positions of media_pad \(id 60\), accepted 0"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: got 0"),
        ({"num_samples": 1.5}, TypeError, "num_samples: got 1.5, accepted an int"),
        ({"temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"top_p": "1"}, TypeError, "top_p: got '1', accepted a number"),
        ({"temperature": None}, TypeError, "temperature: got None, accepted a number"),
        ({"max_new_tokens": "4"}, TypeError, "max_new_tokens: got '4', accepted an int"),
        ({"prompts": [1, 2]}, TypeError, r"prompts\[0\]: got 1, accepted token ids: a list"),
        ({"prompts": 3}, TypeError, "prompts: got 3, accepted a sequence of prompts"),
        ({"prompts": [[True]]}, TypeError, r"prompts\[0\]: got True"),
        ({"prompts": [torch.tensor([[1, 2]])]}, TypeError, r"prompts\[0\]: got \[1, 2\], accepted token ids"),
        ({"prompts": [torch.tensor([0.5])]}, TypeError, r"prompts\[0\]: got 0.5, accepted token ids"),
        ({"stop_ids": 3}, TypeError, "stop_ids: got 3, accepted token ids: a list"),
        ({"stop_ids": ["</s>"]}, TypeError, "stop_ids: got '</s>', accepted token ids"),
        ({"stop_ids": [64]}, ValueError, "stop_ids: got token 64, accepted 0 to 63"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception], error: str) -> None:
    call: dict[str, Any] = {"prompts": [[1, 2]], "max_new_tokens": 4, **arguments}
    with pytest.raises(kind, match=error):
        generate(plain_case().model(), **call)


def test_any_integers_are_token_ids() -> None:
    model = plain_case(clips=()).model()
    want = generate(model, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0.0, stop_ids=(9,))
    counts: dict[str, Any] = {"max_new_tokens": np.int64(5), "temperature": np.float32(0)}
    forms: list[Any] = [[np.array([1, 2, 3]), np.array([4])], [torch.tensor([1, 2, 3]), (np.int32(4),)]]
    stop_forms: list[Any] = [np.array([9]), {9}, torch.tensor([9])]
    for prompts in forms:
        for stops in stop_forms:
            got = generate(model, prompts, stop_ids=stops, **counts)
            assert got == want
            assert {type(token) for sample in got for token in sample.token_ids} == {int}


def test_no_prompts_give_no_samples() -> None:
    assert generate(plain_case().model(), [], max_new_tokens=4) == []
