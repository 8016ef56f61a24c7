"""Zero-vision trajectories: answers computed anew from the pictures, programs really run, the mask, and bad files."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25sys.data import SPECIAL_LITERALS, ByteTokenizer
from k25sys.data.trajectories import (
    TASK_KINDS,
    ConversationSource,
    PythonSandbox,
    generated_conversations,
    make_conversation,
    make_conversations,
    make_task,
    write_conversations,
)
from k25sys.data.trajectories.__main__ import main
from k25sys.data.trajectories.generate import run_task
from k25sys.errors import ArgumentTypeError, ArgumentValueError, FileFormatError, TrajectoryError
from tests.data.trajectory_oracles import ORACLES

TOKENIZER = ByteTokenizer()
KINDS = list(TASK_KINDS)
COUNT = 2 * len(KINDS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trajectories") / "conversations.jsonl"

    def fail(index: int, reason: str) -> None:
        raise AssertionError(f"problem {index} is rejected: {reason}")

    write_conversations(file, COUNT, 5, jobs=2, on_rejected=fail)
    return file


@pytest.fixture(scope="module")
def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_pictures(kind: str) -> None:
    tasks = [make_task(seed, KINDS.index(kind) + len(KINDS) * turn) for seed in (0, 7) for turn in range(4)]
    for task in tasks:
        assert ORACLES[kind](task) == task.answer
    assert len({task.question for task in tasks}) > 3
    assert len({task.answer for task in tasks}) > 1


def test_some_first_attempts_are_wrong_in_most_kinds() -> None:
    tasks = {kind: [make_task(0, i + len(KINDS) * turn) for turn in range(12)] for i, kind in enumerate(KINDS)}
    mistaken = {kind: [any(s.fails or s.misleads for s in task.steps) for task in tasks[kind]] for kind in KINDS}
    assert sum(any(flags) for flags in mistaken.values()) >= 10
    assert sum(not all(flags) for flags in mistaken.values()) >= 10
    assert all(not (task.steps[-1].fails or task.steps[-1].misleads) for each in tasks.values() for task in each)


def test_conversations_are_of_the_sandbox_and_end_in_the_answer(records: list[dict[str, Any]]) -> None:
    assert [record["kind"] for record in records] == KINDS * 2
    for record in records[: len(KINDS)]:
        task = make_task(record["seed"], record["index"])
        with PythonSandbox(cell_seconds=60) as sandbox:
            outputs = [result.text for result in run_task(task, sandbox)]
        roles = [message["role"] for message in record["messages"]]
        start = roles.index("user") + 1
        assert roles[start:] == ["assistant", "tool"] * len(task.steps) + ["assistant"]
        assert [message["content"] for message in record["messages"] if message["role"] == "tool"] == outputs
        codes = [
            json.loads(call["function"]["arguments"])["code"]
            for message in record["messages"]
            for call in message.get("tool_calls", [])
        ]
        assert codes == [step.code for step in task.steps]
        assert task.answer == record["answer"]
        assert task.answer in record["messages"][-1]["content"]
        assert "{output}" not in json.dumps(record)
        assert "k25sys" not in json.dumps(record)
        assert all(message["reasoning_content"] for message in record["messages"] if message["role"] == "assistant")


def test_the_same_seed_gives_the_same_file(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl"
    command = [sys.executable, "-m", "k25sys.data.trajectories", "--count", "3", "--seed", "5", "--output", str(again)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 conversations, 0 problems left out" in done.stdout
    assert again.read_bytes().splitlines() == file.read_bytes().splitlines()[:3]
    assert list(tmp_path.iterdir()) == [again]
    assert make_conversation(6, 0) != make_conversation(5, 0)


def test_the_command_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, reason in (
        (["--count", "0", "--output", str(tmp_path / "x")], "count: got 0"),
        (["--count", "1", "--output", str(tmp_path / "absent" / "x")], "No such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["trajectories", *arguments])
        assert main() == 1
        assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_trajectory_that_does_not_hold_is_rejected() -> None:
    task = make_task(5, KINDS.index("turn"))
    wrong = [
        (replace(task, answer="(0, 0)"), "the last line is"),
        (replace(task, saves={"result.png": 255 - task.saves["result.png"]}), "another picture"),
        (replace(task, saves={"absent.png": task.saves["result.png"]}), "missing"),
        (replace(task, steps=(*task.steps[:-1], replace(task.steps[-1], fails=True))), "ends as ok"),
        (replace(task, steps=(*task.steps[:-1], replace(task.steps[-1], misleads=True))), "should not have found"),
        (replace(task, steps=(replace(task.steps[-1], code="1 / 0"),)), "ends as error"),
    ]
    for changed, reason in wrong:
        with PythonSandbox(cell_seconds=60) as sandbox, pytest.raises(TrajectoryError, match=reason):
            run_task(changed, sandbox)


def test_rejected_problems_are_left_out_and_too_many_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(seed: int, index: int) -> dict[str, Any]:
        if index in bad:
            raise TrajectoryError("no")
        return {"index": index}

    monkeypatch.setattr("k25sys.data.trajectories.generate.make_conversation", attempt)
    bad, told = {0, 3, 4}, []
    found = make_conversations(6, 0, jobs=2, on_rejected=lambda index, _: told.append(index))
    assert [record["index"] for record in found] == [1, 2, 5, 6, 7, 8]
    assert told == [0, 3, 4]
    bad = set(range(1000))
    with pytest.raises(TrajectoryError, match="11 rejected, 0 kept; the last: no"):
        list(make_conversations(100, 0))


def test_loss_is_on_what_the_assistant_wrote(file: Path, records: list[dict[str, Any]]) -> None:
    source = ConversationSource(file, TOKENIZER)
    assert (source.name, source.has_media, len(source)) == ("conversations", False, COUNT)
    literal = SPECIAL_LITERALS
    for index, record in enumerate(records):
        sample = source.sample(index, 0)
        sample.check(TOKENIZER.special.media_pad)
        expected = []
        for message in record["messages"]:
            if message["role"] == "assistant":
                text = message["reasoning_content"] + literal["end_think"] + message["content"]
                calls = [
                    literal["tool_call_begin"] + call["id"] + literal["tool_call_argument_begin"]
                    + call["function"]["arguments"] + literal["tool_call_end"]
                    for call in message.get("tool_calls", [])
                ]  # fmt: skip
                if calls:
                    text += literal["tool_calls_section_begin"] + "".join(calls) + literal["tool_calls_section_end"]
                expected.append(text + literal["im_end"])
        starts = np.flatnonzero(np.diff(sample.loss_S.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(sample.loss_S.astype(int), append=0) == -1) + 1
        runs = [TOKENIZER.decode(sample.ids_S[a:b]) for a, b in zip(starts, ends, strict=True)]
        assert runs == expected
        masked = TOKENIZER.decode(sample.ids_S[~sample.loss_S])
        for message in record["messages"]:
            if message["role"] != "assistant":
                assert message["content"] in masked
        assert '"name":"ipython"' in masked
        assert sample.ids_S.dtype == np.int64


def test_a_source_is_the_same_in_another_process_and_epoch(file: Path) -> None:
    source = ConversationSource(file, TOKENIZER, name="sft")
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name == "sft"
    assert (copy.sample(3, 9).ids_S == source.sample(3, 0).ids_S).all()


def test_generated_conversations_are_kept_in_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept.jsonl"
    first = generated_conversations(2, 5, TOKENIZER, file)
    monkeypatch.setattr("k25sys.data.trajectories.source.write_conversations", None)
    again = generated_conversations(2, 5, TOKENIZER, file)
    assert (first.name, len(first)) == (again.name, len(again)) == ("trajectories-5", 2)
    assert (first.sample(1, 0).ids_S == again.sample(1, 0).ids_S).all()
    for count, seed in ((3, 5), (2, 6)):
        with pytest.raises(FileFormatError, match=r"2 conversations of seed 5.*name another file"):
            generated_conversations(count, seed, TOKENIZER, file)


def write(file: Path, *messages: Any, **record: Any) -> Path:
    file.write_text("\n" + json.dumps({"messages": messages, **record}) + "\n")
    return file


def test_files_of_others(tmp_path: Path) -> None:
    call = {"id": "call_x1", "type": "function", "function": {"name": "search", "arguments": {"q": 1}}}
    file = write(
        tmp_path / "chat.jsonl",
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B<|im_end|>"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_x1", "content": "found"},
        {"role": "assistant", "content": "Yes."},
    )
    sample = ConversationSource(file, TOKENIZER).sample(0, 0)
    text = TOKENIZER.decode(sample.ids_S)
    assert "AB<|im_end|>" in text
    assert "## Return of functions.search:0\nfound" in text
    assert "call_x1" not in text
    assert int((sample.ids_S == TOKENIZER.special.im_end).sum()) == 4


USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "y"}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER], "none of the assistant"),
        ([USER, {"role": "robot", "content": "x"}], r"messages\[1\]: role 'robot'"),
        ([3], "role None"),
        ([{"role": [], "content": ""}, ANSWER], r"role \[\]"),
        ([{**USER, "weight": 0}, ANSWER], "user with weight"),
        ([{"role": "user", "content": 3}, ANSWER], "content is int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": ""}]}, ANSWER], "text only"),
        ([USER, {**ANSWER, "reasoning_content": 1}], "reasoning_content is no text"),
        ([USER, {**ANSWER, "tool_calls": {}}], "tool_calls is no list"),
        ([USER, {**ANSWER, "tool_calls": [{}]}], "without a function's name"),
        ([USER, {**ANSWER, "tool_calls": [CALL, CALL]}], "'a' is not a new text"),
        ([USER, {**ANSWER, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "["}}]}], "JSON text"),
        ([USER, ANSWER, {"role": "tool", "tool_call_id": "b", "content": ""}], "'b' is of no call"),
        ([USER, ANSWER, {"role": "tool", "tool_call_id": ["b"], "content": ""}], "is of no call"),
        ([{**USER, "name": 3}, ANSWER], "name is no text"),
    ],
)
def test_bad_messages_are_refused_by_line(tmp_path: Path, messages: list[Any], reason: str) -> None:
    source = ConversationSource(write(tmp_path / "bad.jsonl", *messages), TOKENIZER)
    with pytest.raises(FileFormatError, match=rf"bad\.jsonl:2: .*{reason}"):
        source.sample(0, 0)


def test_bad_files_and_arguments(tmp_path: Path, file: Path) -> None:
    for text in ("[]", "{", '{"messages": 3}', '{"messages": [], "tools": 3}', "[" * 100_000, "\udcff"):
        bad = tmp_path / "bad.jsonl"
        bad.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(FileFormatError, match=r"bad\.jsonl:1: "):
            ConversationSource(bad, TOKENIZER).sample(0, 0)
    bad.write_text("\n\n")
    with pytest.raises(FileFormatError, match="no lines"):
        ConversationSource(bad, TOKENIZER)
    with pytest.raises(FileNotFoundError):
        ConversationSource(tmp_path / "absent.jsonl", TOKENIZER)
    source = ConversationSource(write(bad, USER, ANSWER), TOKENIZER)
    write(bad, USER, ANSWER, ANSWER)
    with pytest.raises(FileFormatError, match="another size"):
        source.sample(0, 0)
    source = ConversationSource(file, TOKENIZER)
    for index, epoch in ((-1, 0), (COUNT, 0), (0, -1)):
        with pytest.raises(ArgumentValueError):
            source.sample(index, epoch)
    with pytest.raises(ArgumentTypeError):
        source.sample(0.0, 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="it has only text"):
        source.pixels("x")
    with pytest.raises(ArgumentValueError, match="index"):
        make_task(0, -1)
    with pytest.raises(ArgumentTypeError, match="seed"):
        make_task("0", 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="jobs"):
        make_conversations(1, 0, jobs=0)
