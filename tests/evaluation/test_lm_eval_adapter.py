"""The adapter against teacher-forced logits. Where lm-eval is not installed, a small fake stands for its base class."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from k25sys.data import ByteTokenizer
from k25sys.evaluation.lm_eval_adapter import lm_eval_model
from k25sys.models import KimiK25, generate
from k25sys.models.presets import preset

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.special.eos


class FakeLM:
    """What the adapter uses of lm_eval.api.model.LM."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)


@pytest.fixture(autouse=True)
def _harness(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", FakeLM, raising=False)


@pytest.fixture(scope="module")
def tiny() -> KimiK25:
    return KimiK25(preset("tiny"), generator=torch.Generator().manual_seed(0))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@torch.no_grad()
def logprobs(model: KimiK25, ids: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` ids, from one forward of the text alone."""
    logprobs_SV = model(torch.tensor([ids[:-1]]))[0, -count:].log_softmax(-1)
    wanted = torch.tensor(ids[-count:])
    return float(logprobs_SV.gather(1, wanted[:, None]).sum()), bool((logprobs_SV.argmax(-1) == wanted).all())


def test_loglikelihood(tiny: KimiK25) -> None:
    pairs = [("The cat", " sat"), ("", "x"), ("space ", "moves"), ("long " * 20, "end")]
    for packed in (4, 16_384):
        lm = lm_eval_model(tiny, TOKENIZER, max_length=24, max_packed_tokens=packed)
        found = lm.loglikelihood(requests(*pairs))
        for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
            count = len(continuation) + len(context) - len(context.rstrip())
            ids = [EOS, *TOKENIZER.encode(context + continuation)][-25:]
            assert logprob == pytest.approx(logprobs(tiny, ids, count)[0], abs=1e-4)
            assert not is_greedy


def test_the_likeliest_continuation_is_greedy() -> None:
    model = KimiK25(preset("tiny"))
    torch.nn.init.zeros_(model.language_model.lm_head.weight)  # all alike: of a tie the lowest id is taken
    pairs = [("a", "\0"), ("a", "\0\0"), ("a", "\0b")]
    found = lm_eval_model(model, TOKENIZER).loglikelihood(requests(*pairs))
    one = -math.log(model.config.text.vocab_size)
    assert [logprob for logprob, _ in found] == pytest.approx([one, 2 * one, 2 * one])
    assert [is_greedy for _, is_greedy in found] == [True, True, False]


def test_rolling_windows_count_each_token_once(tiny: KimiK25) -> None:
    text = "abcdefghijk"
    ids = [EOS, *TOKENIZER.encode(text)]
    # Windows of at most 4: after eos a b c, then d e f g, and the last reaches back: h before i j k.
    wanted = [(ids[0:5], 4), (ids[4:9], 4), (ids[7:12], 3)]
    found = lm_eval_model(tiny, TOKENIZER, max_length=4).loglikelihood_rolling(requests((text,), ("",), ("ab",)))
    assert found[0] == pytest.approx(sum(logprobs(tiny, window, count)[0] for window, count in wanted), abs=1e-4)
    assert found[1] == 0.0
    assert found[2] == pytest.approx(logprobs(tiny, ids[:3], 2)[0], abs=1e-4)


def test_generate_until(tiny: KimiK25) -> None:
    lm = lm_eval_model(tiny, TOKENIZER, max_length=32, max_gen_toks=12, max_sequences=2)
    prompts = ["one", "two", "a prompt that is longer than the window"]
    whole = lm.generate_until(requests(*((prompt, {}) for prompt in prompts)))
    for prompt, text in zip(prompts, whole, strict=True):
        (sample,) = generate(tiny, [[EOS, *TOKENIZER.encode(prompt)][-20:]], max_new_tokens=12, temperature=0.0)
        ids = [token for token in sample.token_ids if token < TOKENIZER.vocab_size and token != EOS]
        assert text == TOKENIZER.decode(ids)
    long = max(whole, key=len)
    assert len(long) > 3
    cut = lm.generate_until(
        requests((prompts[whole.index(long)], {"until": [long[2:], "\0never"]}), ("x", {"until": ""}))
    )
    assert cut[0] == long[: long.index(long[2:])]
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    mixed = lm.generate_until(requests(("one", {}), ("one", sampled), ("two", {})))
    assert [mixed[0], mixed[2]] == whole[:2]


@pytest.mark.parametrize(
    "options", [{"until": 3}, {"until": [3]}, {"max_gen_toks": 0}, {"max_gen_toks": 99}, {"num_beams": 4}], ids=str
)
def test_options_that_are_refused(tiny: KimiK25, options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="generate_until"):
        lm_eval_model(tiny, TOKENIZER, max_length=32, max_gen_toks=4).generate_until(requests(("x", options)))


def test_bad_calls(tiny: KimiK25, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("max_length", 0), ("max_length", 10**9), ("max_packed_tokens", 0), ("max_gen_toks", 0)):
        with pytest.raises(ValueError, match=f"lm_eval_model: {name}"):
            lm_eval_model(tiny, TOKENIZER, **{name: value})
    lm = lm_eval_model(tiny, TOKENIZER, max_length=4)
    for continuation in ("", "12345"):
        with pytest.raises(ValueError, match="continuation"):
            lm.loglikelihood(requests(("x", continuation)))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"k25sys\[lm-eval\]"):
        lm_eval_model(tiny, TOKENIZER)
