"""`python -m k25sys eval`: a file in, a table and a report out; bad input is one line."""

import json
from pathlib import Path

import pytest

from k25sys.__main__ import main
from k25sys.data import sample_file
from k25sys.evaluation.tasks import tasks

Capture = pytest.CaptureFixture[str]


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["k25sys", "eval", *arguments])
    return main()


@pytest.fixture
def questions(tmp_path: Path) -> str:
    photograph = {"image": str(sample_file("china.jpg"))}
    rows = [
        {"id": "text", "prompt": "Which?", "choices": ["this", "that"], "answer": "B"},
        {
            "id": "image",
            "prompt": [photograph, "Where?"],
            "num_choices": 4,
            "answer": "C",
        },
        {"id": "more", "prompt": "Which?", "choices": ["this", "that"], "answer": "A"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "q.jsonl")


def test_a_score_beside_the_reports(monkeypatch: pytest.MonkeyPatch, capsys: Capture, questions: str) -> None:
    written = Path(questions).with_name("report.json")
    flags = ("--limit", "2", "--samples", "2", "--max-new-tokens", "3", "--json", str(written))
    assert evaluate(monkeypatch, "gpqa-diamond", questions, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"measured: preset tiny with random weights, seed 0, on {questions}"
    assert lines[1].split() == ["task", "metric", "n", "k", "score", "s.e.", "K2.5*"]
    assert lines[2].split() == ["gpqa-diamond", "accuracy", "2", "2", "0.00", "0.00", "87.6"]
    assert "note: num_samples 2 instead of 8" in lines
    assert lines[-1].startswith("* of Kimi K2.5 as its makers report it")
    report = json.loads(written.read_text())
    assert [item["id"] for item in report["items"]] == ["text", "image"]
    assert all(len(item["scores"]) == len(item["replies"]) == 2 for item in report["items"])


def test_the_list(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert evaluate(monkeypatch, "--list") == 0
    listed = capsys.readouterr().out
    assert all(f"\n{task.name} " in listed for task in tasks())
    assert "needs a language model as judge" in listed


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "accepted TASK FILE.jsonl, or --list"),
        (("choice",), "accepted TASK FILE.jsonl, or --list"),
        (("hle", "{}"), "needs a language model as judge"),
        (("nothing", "{}"), "accepted a name of eval --list"),
        (("choice", "missing.jsonl"), "missing.jsonl"),
        (("number", "{}"), "q.jsonl line 1"),
        (("choice", "{}", "--limit", "0"), "limit"),
        (("choice", "{}", "--samples", "0"), "num_samples"),
        (("choice", "{}", "--max-new-tokens", "0"), "max_tokens"),
        (("choice", "{}", "--max-new-tokens", "1000000"), "q.jsonl lines 1 to 3: generate: prompts[0]"),
        (("choice", "{}", "--max-sequences", "0"), "max_sequences"),
        (("choice", "{}", "--json", "missing/report.json"), "--json"),
        (("choice", "{}", "--checkpoint", "missing"), "missing"),
        (("choice", "{}", "--preset", "k25"), "this machine has"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, questions: str, arguments: tuple[str, ...], text: str
) -> None:
    assert evaluate(monkeypatch, *(questions if each == "{}" else each for each in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("eval: ")
    assert text in error
    assert error.count("\n") == 1
