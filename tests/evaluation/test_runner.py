"""Tasks over rows, with an engine of fixed replies and with a model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k25sys.data import ByteTokenizer, render_chat, sample_file, video_grids
from k25sys.data.chat import UserTurn
from k25sys.evaluation import engine as engine_module
from k25sys.evaluation.engine import ModelEngine, Reply, Sampling, video_limits
from k25sys.evaluation.rows import Media, Prompt, Row
from k25sys.evaluation.runner import evaluate
from k25sys.evaluation.tasks import find_task
from k25sys.models import KimiK25, Sample, generate
from k25sys.models.presets import preset


class Fixed:
    """An engine that answers by the first text of a prompt."""

    def __init__(self, replies: dict[str, list[str]]) -> None:
        self.replies, self.asked, self.samplings = replies, [], []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Reply]]:
        self.asked += prompts
        self.samplings.append(sampling)
        found = [next(v for k, v in self.replies.items() if str(prompt[0]).startswith(k)) for prompt in prompts]
        return [[Reply(text, len(text), bool(text)) for text in texts] for texts in found]


def row(name: str, answer: Any, **fields: Any) -> Row:
    choices = fields.pop("num_choices", 0)
    return Row(id=name, prompt=(name,), answer=answer, num_choices=choices, fields=fields)


def test_average_standard_error_and_report() -> None:
    task = replace(find_task("aime-2025"), num_samples=2, max_tokens=100)
    engine = Fixed({"p": [r"\boxed{7}", ""], "q": ["7", r"\boxed{\frac{14}{2}}"], "r": ["1", "2"]})
    done = []
    report = evaluate(
        task, [row("p", 7), row("q", "7"), row("r", "7")], engine, label="mine", batch=2,
        on_progress=lambda *counts: done.append(counts),
    )  # fmt: skip
    assert report.score == 50
    assert report.standard_error == pytest.approx(100 / 12**0.5)  # means 1/2, 1, 0
    assert [item.scores for item in report.items] == [(1, 0), (1, 1), (0, 0)]
    assert done == [(2, 3), (3, 3)]
    assert engine.asked[0] == ("p\n\nPut your final answer within \\boxed{}.",)
    assert engine.samplings[0] == Sampling(num_samples=2, max_tokens=100, temperature=1.0, top_p=0.95, mode="thinking")
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (written["label"], written["n"], written["k"], written["score"]) == ("mine", 3, 2, 50)
    assert written["standard_error"] == pytest.approx(report.standard_error)
    assert written["reference"]["score"] == 96.1
    assert written["items"][0]["replies"][0] == {"text": r"\boxed{7}", "num_tokens": 9, "is_complete": True}
    assert written["remarks"] == [
        find_task("aime-2025").remark,
        "num_samples 2 instead of 64", "max_tokens 100 instead of 98304", "1 of 6 replies were cut at max_tokens",
    ]  # fmt: skip


def test_pairs_are_right_together() -> None:
    task = replace(find_task("mmvp"), num_samples=2)
    rows = [row(name, "A", num_choices=2, pair=name[0]) for name in ("xa", "ya", "xb", "yb")]
    report = evaluate(task, rows, Fixed({"xa": ["A", "A"], "xb": ["B", "A"], "y": ["A", "A"]}))
    assert (report.score, report.average.num_problems) == (75, 2)
    assert len(report.items) == 4


BOXES = [[0, 0, 10, 10], [20, 20, 30, 30]]
TABLE = [{"City": "Rome", "People": "2.8"}, {"City": "Oslo", "People": "0.7"}]


@pytest.mark.parametrize(
    ("task", "question", "reply", "score"),
    [
        ("hmmt-2025", row("p", r"\frac{\pi}{2}"), r"So \boxed{\pi/2}", 1),
        ("gpqa-diamond", row("p", "C", num_choices=4), "Answer: C", 1),
        ("mmmu", row("p", "C", num_choices=4), "Answer: D", 0),
        ("mmmu", row("p", ["Rome", "Roma"]), "Answer: roma.", 1),
        ("mmmu", row("p", 1.33), "Answer: 1.333", 1),
        ("mmmu", row("p", "1.33"), "Answer: 1.34", 0),
        ("mmmu", row("p", "mitral valve"), "the mitral valve stenosis", 1),
        ("mmmu", row("p", "3"), "of 3 segments there are 4", 1),
        ("videommmu", row("p", "3"), "of 3 segments there are 4", 0),
        ("videommmu", row("p", "C", num_choices=4), "Answer: `C`", 1),
        ("mathvision", row("p", 1.33), "Answer: 1.333", 0),
        ("aime-2025", row("p", "73"), r"\boxed{m+n=73}", 1),
        ("mathvista", row("p", 1.25, decimals=1), "Answer: 1.2", 1),
        ("mathvista", row("p", 1.25), "Answer: 1.2", 0),
        ("zerobench", row("p", "12.5"), "{1} or rather {12.5}", 1),
        ("zerobench", row("p", "12.5"), "12.5", 0),
        ("omnidocbench", row("p", "abcd"), "abxd", 0.75),
        ("ocrbench", row("p", ["STOP"]), "It says Stop.", 1),
        ("ocrbench", row("p", "a^{2}", dataset_name="HME100k"), "a ^ { 2 }", 1),
        ("infovqa", row("p", ["four"]), "foor", 0.75),
        ("chart", row("p", "100"), "Answer: 96", 1),
        ("exact", row("p", "the Nile"), "The answer is Nile.", 1),
        ("boxes", row("p", BOXES), "[[0, 0, 10, 9]]", 2 / 3),
        ("boxes", row("p", []), "[]", 1),
        ("table-items", row("p", TABLE, keys=["City"]), "|City|People|\n|-|-|\n|Oslo|0.7|\n|Rome|3|", 3 / 4),
        ("table-rows", row("p", TABLE, keys=["City"]), "|City|People|\n|-|-|\n|Oslo|0.7|\n|Rome|3|", 1 / 2),
    ],
    ids=str,
)
def test_each_rule(task: str, question: Row, reply: str, score: float) -> None:
    report = evaluate(replace(find_task(task), num_samples=1), [question], Fixed({"p": [reply]}))
    assert report.items[0].scores == pytest.approx((score,))
    assert report.standard_error is None


def test_what_cannot_be_evaluated() -> None:
    engine = Fixed({"p": ["1"]})
    with pytest.raises(ValueError, match="needs a language model as judge"):
        evaluate(find_task("hle"), [row("p", "1")], engine)
    for rows, batch, found in (([], 1, "rows"), ([row("p", 1)], 0, "batch"), ([row("p", 1)], 1, "engine")):
        with pytest.raises(ValueError, match=f"evaluate: {found}"):
            evaluate(find_task("aime-2025"), rows, engine, batch=batch)


@pytest.fixture(scope="module")
def tiny() -> KimiK25:
    return KimiK25(preset("tiny"), generator=torch.Generator().manual_seed(0))


GREEDY = Sampling(num_samples=1, max_tokens=6, temperature=0.0, top_p=1.0, mode="instant")


def test_replies_are_the_models(tiny: KimiK25) -> None:
    """Prompts of a batch answer as alone, and as `generate` does."""
    tokenizer = ByteTokenizer()
    texts = ["one", "a longer prompt", "x"]
    together = ModelEngine(tiny, tokenizer).generate([(text,) for text in texts], GREEDY)
    alone = ModelEngine(tiny, tokenizer, max_sequences=1).generate([(text,) for text in texts], GREEDY)
    assert together == alone
    for text, (reply,) in zip(texts, together, strict=True):
        ids = render_chat([UserTurn(content=text)], tokenizer, prompt="instant").token_ids
        (sample,) = generate(tiny, [ids], max_new_tokens=6, temperature=0.0)
        known = [token for token in sample.token_ids if token < tokenizer.vocab_size]
        assert reply == Reply(tokenizer.decode(known).strip(), 6, False)


def test_pictures_and_videos(tiny: KimiK25, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)).save(tmp_path / "a.png")
    prompts: list[Prompt] = [
        (Media("image", tmp_path / "a.png"), "What?"),
        ("No media",),
        (Media("video", sample_file("carphone_distorted.mp4")), Media("image", tmp_path / "a.png")),
    ]
    calls = []

    def record(*arguments: Any, **options: Any) -> list[Sample]:
        calls.append(options)
        return generate(*arguments, **options)

    monkeypatch.setattr(engine_module, "generate", record)
    sampling = replace(GREEDY, max_tokens=2, frames=5, frame_side=56)
    for dtype in (torch.float32, torch.bfloat16):
        model = KimiK25(preset("tiny")).to(dtype) if dtype != torch.float32 else tiny
        assert [len(each) for each in ModelEngine(model, ByteTokenizer()).generate(prompts, sampling)] == [1, 1, 1]
    # The video has 5 frames in clips of 4 and 1, each 144 x 176 made at most 4 patches a side.
    assert calls[0]["grid_thw"].tolist() == [[1, 4, 6], [4, 4, 4], [1, 4, 4], [1, 4, 6]]


@pytest.mark.parametrize(("task", "frames", "tokens"), [("motionbench", 128, 32_768), ("lvbench", 2048, 131_072)])
def test_video_tokens_are_the_reports(task: str, frames: int, tokens: int) -> None:
    setting = find_task(task)
    sampling = replace(GREEDY, frames=setting.frames, frame_side=setting.frame_side)
    grids = video_grids(9000, 25.0, 1080, 1080, video_limits(sampling))
    assert sum(t for t, _, _ in grids) == frames
    assert sum(h * w // 4 for _, h, w in grids) == tokens


def test_thinking_stop_tokens_and_many_samples(tiny: KimiK25, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    special, encode = tokenizer.special, tokenizer.encode
    written = {
        "ended": [*encode("hm B"), special.end_think, *encode(" C "), special.im_end],
        "cut in its answer": [*encode("hm"), special.end_think, *encode("B")],
        "cut in its thinking": encode("surely B"),
        "of no text": [*encode("hm"), special.end_think, 511, *encode("B"), special.eos],
    }
    counts = []

    def fake(model: KimiK25, prompts: list[list[int]], *, num_samples: int, **_: Any) -> list[Sample]:
        counts.append((len(prompts), num_samples))
        samples = [Sample(ids, [0.0] * len(ids)) for ids in written.values()]
        return [samples[i % 4] for _ in prompts for i in range(num_samples)]

    monkeypatch.setattr(engine_module, "generate", fake)
    sampling = replace(GREEDY, mode="thinking", num_samples=10)
    first, second = ModelEngine(tiny, tokenizer, max_sequences=4).generate([("a",), ("b",)], sampling)
    assert counts == [(1, 4), (1, 4), (1, 2)] * 2
    assert [len(first), len(second)] == [10, 10]
    assert [reply.text for reply in first[:4]] == ["C", "B", "", "B"]
    assert [reply.is_complete for reply in first[:4]] == [True, False, False, True]
    assert first[0].num_tokens == len(written["ended"])
    counts.clear()
    ModelEngine(tiny, tokenizer, max_sequences=8).generate([("a",)] * 5, replace(sampling, num_samples=3))
    assert counts == [(2, 3), (2, 3), (1, 3)]
    (instant,) = ModelEngine(tiny, tokenizer).generate([("a",)], replace(sampling, mode="instant", num_samples=1))
    assert instant[0].text == "hm B</think> C"


def test_a_seed_gives_the_same_samples(tiny: KimiK25) -> None:
    sampling = replace(GREEDY, temperature=1.0, num_samples=3)
    runs = [ModelEngine(tiny, ByteTokenizer(), seed=seed).generate([("a",)], sampling) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match="max_sequences"):
        ModelEngine(tiny, ByteTokenizer(), max_sequences=0)
