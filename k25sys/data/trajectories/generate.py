"""Conversations of generated problems: the programs really run, and what the tool says is what the sandbox gave."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from k25sys.data.chat import ToolCall
from k25sys.data.trajectories.sandbox import CellResult, PythonSandbox
from k25sys.data.trajectories.task import Task
from k25sys.data.trajectories.tasks import make_task, task_kind
from k25sys.errors import ArgumentTypeError, ArgumentValueError, TrajectoryError, message

TOOL: Mapping[str, Any] = MappingProxyType(
    {
        "type": "function",
        "function": {
            "name": "ipython",
            "description": "Runs Python code in a persistent session and returns what it prints, the value of its last "
            "expression, or the traceback. NumPy and Pillow are installed; pictures lie in the working folder.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The code of one cell."}},
                "required": ["code"],
            },
        },
    }
)
"""The declaration of the tool."""
_SYSTEM = (
    None,
    "You are a helpful assistant.",
    "You work on pictures by programs: use the ipython tool, and answer from what it shows.",
    "Solve the user's problem with the ipython tool. Pictures are files in its working folder.",
)
_CELL_SECONDS = 60.0  # generous: a slow machine must not change which trajectories are kept


def run_task(task: Task, sandbox: PythonSandbox) -> list[CellResult]:
    """Runs the cells of a problem in a fresh sandbox. Returns what each gave.

    Raises:
        ValueError (TrajectoryError): the last line is not the answer, a picture that should have been saved is missing
            or another, or a cell goes otherwise than its text says.
    """
    for name, content in task.files.items():
        (sandbox.folder / name).write_bytes(content)
    results = []
    for number, step in enumerate(task.steps):
        result = sandbox.run(step.code)
        results.append(result)
        if result.status != ("error" if step.fails else "ok"):
            raise TrajectoryError(f"cell {number} ends as {result.status}: {result.text}")
        if step.misleads and _last_line(result) == task.answer:
            raise TrajectoryError(f"cell {number} should not have found the answer")
    if _last_line(results[-1]) != task.answer:
        raise TrajectoryError(f"the last line is {_last_line(results[-1])!r}, the answer {task.answer!r}")
    for name, picture_HW3 in task.saves.items():
        path = sandbox.folder / name
        if not path.is_file() or not np.array_equal(_picture(path.read_bytes()), picture_HW3):
            raise TrajectoryError(f"{name} is {'another picture' if path.is_file() else 'missing'}")
    return results


def make_conversation(seed: int, index: int) -> dict[str, Any]:
    """Problem `index` of that seed as a record of a chat JSONL file: kind, seed, index, answer, tools, messages.

    Raises:
        TypeError, ValueError: as `make_task` and `run_task`.
        RuntimeError (SandboxError), OSError: as `PythonSandbox`.
    """
    task = make_task(seed, index)
    with PythonSandbox(cell_seconds=_CELL_SECONDS) as sandbox:
        results = run_task(task, sandbox)
    system = Random(f"{seed}/{index}/system").choice(_SYSTEM)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": task.question})
    last = ""
    for number, (step, result) in enumerate(zip(task.steps, results, strict=True)):
        call = ToolCall(name="ipython", index=number, arguments=json.dumps({"code": step.code}, ensure_ascii=False))
        function = {"name": call.name, "arguments": call.arguments}
        messages.append(
            {
                "role": "assistant",
                "reasoning_content": step.thinking.replace("{output}", last),
                "content": step.text.replace("{output}", last),
                "tool_calls": [{"id": call.id, "type": "function", "function": function}],
            }
        )
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result.text})
        last = _last_line(result)
    thinking, reply = (text.replace("{output}", last) for text in (task.thinking, task.reply))
    messages.append({"role": "assistant", "reasoning_content": thinking, "content": reply})
    head = {"kind": task_kind(index), "seed": seed, "index": index, "answer": task.answer}
    return {**head, "tools": [dict(TOOL)], "messages": messages}


def make_conversations(
    count: int, seed: int, *, jobs: int = 1, on_rejected: Callable[[int, str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The first `count` records of that seed whose programs solve their problems, in order.

    Args:
        count, seed: at least 1, at least 0.
        jobs: sandboxes that run side by side; the records do not depend on it.
        on_rejected: is told the index of a problem that is left out, and why.

    Raises:
        TypeError, ValueError: a count, seed or jobs out of range; TrajectoryError where more problems are rejected than
            kept and than 10.
        RuntimeError (SandboxError), OSError: as `PythonSandbox`.
    """
    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("jobs", jobs, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(message("make_conversations", name, type(value).__name__, "an int"))
        if value < least:
            raise ArgumentValueError(message("make_conversations", name, value, f"at least {least}"))
    return _records(count, seed, jobs, on_rejected)


def write_conversations(
    file: str | os.PathLike[str],
    count: int,
    seed: int,
    *,
    jobs: int = 1,
    on_rejected: Callable[[int, str], None] | None = None,
) -> None:
    """Writes what `make_conversations` gives as JSON lines. The file appears when it is whole. Raises as it does."""
    records = make_conversations(count, seed, jobs=jobs, on_rejected=on_rejected)
    path = Path(file)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as out:
            for record in records:
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp lets only the owner read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _records(
    count: int, seed: int, jobs: int, on_rejected: Callable[[int, str], None] | None
) -> Iterator[dict[str, Any]]:
    def attempt(index: int) -> dict[str, Any] | str:
        try:
            return make_conversation(seed, index)
        except TrajectoryError as error:
            return str(error)

    kept = rejected = start = 0
    with ThreadPoolExecutor(jobs) as pool:
        while kept < count:
            end = start + min(count - kept, 4 * jobs)
            for index, record in zip(range(start, end), pool.map(attempt, range(start, end)), strict=True):
                if isinstance(record, str):
                    rejected += 1
                    if on_rejected:
                        on_rejected(index, record)
                    if rejected > max(kept, 10):
                        got = f"{rejected} rejected, {kept} kept; the last: {record}"
                        raise TrajectoryError(message("make_conversations", "problems", got, "more kept than rejected"))
                else:
                    kept += 1
                    yield record
            start = end


def _last_line(result: CellResult) -> str:
    lines = result.text.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _picture(content: bytes) -> np.ndarray:
    with Image.open(BytesIO(content)) as image:
        return np.array(image.convert("RGB"))
