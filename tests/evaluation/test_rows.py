"""JSON lines: what is read, and what is refused with the file and the line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from k25sys.evaluation.rows import Media, read_rows
from k25sys.evaluation.runner import check_rows, prompt_of
from k25sys.evaluation.tasks import find_task, tasks

GOOD = {"id": "a", "prompt": "1 + 1?", "answer": "2"}


def write(folder: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "rows.jsonl").write_text("\n".join(texts))
    return folder / "rows.jsonl"


def test_a_row_with_all_fields(tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    parts = ["Look:", {"image": "cat.png"}]
    row = {"id": 7, "prompt": parts, "choices": ["one", "two"], "answer": "B", "pair": 3}
    file = write(tmp_path, GOOD, "", row, {**GOOD, "id": "b"})
    first, second = read_rows(file, limit=2)
    assert (first.id, first.prompt, first.answer, first.line) == ("a", ("1 + 1?",), "2", 1)
    assert (second.id, second.num_choices, second.fields, second.line) == ("7", 2, {"pair": 3}, 3)
    assert second.prompt == ("Look:", Media("image", tmp_path / "cat.png"))
    assert prompt_of(second, "Say it.") == (*second.prompt, "A. one\nB. two\n\nSay it.")
    assert prompt_of(first, "Say it.") == ("1 + 1?\n\nSay it.",)
    assert prompt_of(first) == first.prompt
    assert len(read_rows(file)) == 3


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "1", '{"id": "x"} {"id": "y"}', '{"id": "x", "prompt": "x", "answer": NaN}', "[" * 100_000,
        '{"id": "x", "id": "y", "prompt": "x", "answer": "y"}',
        {"prompt": "x", "answer": "y"}, {"id": "x", "answer": "y"}, {"id": "x", "prompt": "x"},
        {**GOOD, "id": 1.5}, {**GOOD, "id": True}, {**GOOD, "id": None},
        {**GOOD, "prompt": []}, {**GOOD, "prompt": 3}, {**GOOD, "prompt": [3]}, {**GOOD, "prompt": [{"sound": "x"}]},
        {**GOOD, "prompt": [{"image": "missing.png"}]}, {**GOOD, "prompt": [{"image": "."}]},
        {**GOOD, "prompt": [{"image": "rows.jsonl", "video": "rows.jsonl"}]}, {**GOOD, "prompt": [{"image": "a\0b"}]},
        {**GOOD, "choices": "AB"}, {**GOOD, "choices": ["one"]}, {**GOOD, "choices": [1, 2]},
        {**GOOD, "choices": ["x"] * 27}, {**GOOD, "num_choices": 1}, {**GOOD, "num_choices": "4"},
        {**GOOD, "choices": ["x", "y"], "num_choices": 3},
        {**GOOD, "id": "first"},
    ],
    ids=lambda line: str(line)[:60],
)  # fmt: skip
def test_malformed_lines_are_named(tmp_path: Path, line: object) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl line 3"):
        read_rows(write(tmp_path, {**GOOD, "id": "first"}, "", line))


def test_files_without_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no line"):
        read_rows(write(tmp_path, "", "  "))
    with pytest.raises(ValueError, match="limit"):
        read_rows(write(tmp_path, GOOD), limit=0)
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl line 1"):
        read_rows(tmp_path / "latin.jsonl")


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("aime-2025", {"answer": "x"}), ("aime-2025", {"answer": True}), ("aime-2025", {"answer": None}),
        ("hmmt-2025", {"answer": ""}), ("hmmt-2025", {"answer": 5}),
        ("gpqa-diamond", {"answer": "A"}), ("gpqa-diamond", {"answer": "C", "choices": ["x", "y"]}),
        ("gpqa-diamond", {"answer": "a", "num_choices": 4}), ("gpqa-diamond", {"answer": "", "num_choices": 4}),
        ("gpqa-diamond", {"answer": "AB", "num_choices": 4}),
        ("mathvista", {"answer": "1.5", "decimals": -1}), ("mathvista", {"answer": "1.5", "choices": ["1.5", "2"]}),
        ("infovqa", {"answer": []}), ("infovqa", {"answer": [""]}), ("infovqa", {"answer": 3}),
        ("boxes", {"answer": [[0, 0, 0, 0]]}), ("boxes", {"answer": [0, 0, 1, 1]}), ("boxes", {"answer": "x"}),
        ("table-items", {"answer": [{"a": "1"}]}), ("table-items", {"answer": [{"a": "1"}], "keys": ["b"]}),
        ("table-items", {"answer": [{"a": "1"}, {"b": "1"}], "keys": ["a"]}),
        ("table-items", {"answer": [{"a": 1}], "keys": ["a"]}), ("table-items", {"answer": [], "keys": ["a"]}),
        ("mmvp", {"answer": "A", "num_choices": 2}), ("mmvp", {"answer": "A", "num_choices": 2, "pair": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_answers_that_a_rule_does_not_take_are_named(tmp_path: Path, task: str, changes: dict) -> None:
    file = write(tmp_path, "", {**GOOD, **changes})
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2"):
        check_rows(find_task(task), read_rows(file), file)


def test_the_tables_of_tasks() -> None:
    names = [task.name for task in tasks()]
    assert len(set(names)) == len(names)
    published = [task for task in tasks() if task.reference is not None]
    assert len(published) == 51  # rows of table 4: 10 + 9 + 9 + 15 + 6 + 2
    assert {task.group: sum(other.group == task.group for other in published) for task in published} == {
        "reasoning": 10, "coding": 9, "agentic": 9, "image": 15, "video": 6, "computer use": 2,
    }  # fmt: skip
    samples = {task.name: task.num_samples for task in tasks()}
    assert [samples[name] for name in ("aime-2025", "gpqa-diamond", "mmmu", "widesearch", "swe-bench-pro")] == [
        64, 8, 3, 4, 5,
    ]  # fmt: skip
    assert all((task.rule is None) == bool(task.needs) for task in tasks())


def test_tasks_that_rules_cannot_score_are_refused() -> None:
    for task in tasks():
        if task.needs:
            with pytest.raises(ValueError, match=r"needs .*, and a score without would be another benchmark's"):
                task.scoring()
        else:
            assert task.scoring() is task.rule
    with pytest.raises(ValueError, match=r"find_task: task: got 'aime2025', accepted .*aime-2025"):
        find_task("aime2025")
    for name, value in (("num_samples", 0), ("max_tokens", 0), ("temperature", float("nan")), ("temperature", -1)):
        with pytest.raises(ValueError, match=f"Task: {name}"):
            replace(find_task("exact"), **{name: value})
