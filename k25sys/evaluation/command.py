"""`python -m k25sys eval`: a task and a file to a table and a report."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation.rows import read_rows
from k25sys.evaluation.tasks import REPORT, Task, find_task, tasks

if TYPE_CHECKING:
    from k25sys.data import Tokenizer
    from k25sys.evaluation.runner import Report
    from k25sys.models import KimiK25


def run(arguments: argparse.Namespace, load: "Callable[[], tuple[KimiK25, Tokenizer]]") -> str:
    """The table of what was measured, or of the tasks there are.

    Args:
        arguments: the flags of `add_eval_arguments`, and seed, checkpoint and preset.
        load: gives the model; called only when task and file are in order.

    Raises:
        ValueError, OSError: an unknown or refused task, a malformed file, a report that cannot be written.
    """
    if arguments.list:
        return task_table()
    if arguments.task is None or arguments.file is None:
        raise ArgumentValueError(message("run", "arguments", "no TASK or no FILE", "TASK FILE.jsonl, or --list"))
    task = _task(arguments)
    task.scoring()
    rows = read_rows(arguments.file, limit=arguments.limit)
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise ArgumentValueError(message("run", "--json", repr(arguments.json), "a file in a folder that exists"))
    from k25sys.evaluation.engine import ModelEngine
    from k25sys.evaluation.runner import check_rows, evaluate

    check_rows(task, rows, arguments.file)
    model, tokenizer = load()
    engine = ModelEngine(model, tokenizer, seed=arguments.seed, max_sequences=arguments.max_sequences)
    weights = arguments.checkpoint or f"preset {arguments.preset} with random weights"
    report = evaluate(
        task, rows, engine, label=f"{weights}, seed {arguments.seed}, on {arguments.file}", file=arguments.file,
        batch=arguments.max_sequences, on_progress=_show_progress,
    )  # fmt: skip
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report.to_json(), indent=2, allow_nan=False))
    return report_table(report)


def _task(arguments: argparse.Namespace) -> Task:
    task = find_task(arguments.task)
    given = {"num_samples": arguments.samples, "max_tokens": arguments.max_new_tokens}
    return replace(task, **{name: value for name, value in given.items() if value is not None})


def _show_progress(done: int, total: int) -> None:
    print(f"eval: {done} of {total} questions", file=sys.stderr)


def report_table(report: "Report") -> str:
    """The score, with the report's beside it, marked as such."""
    task, error = report.task, report.standard_error
    spread = "-" if error is None else f"{error:.2f}"
    reference = "-" if task.reference is None else f"{task.reference:.1f}"
    lines = [
        f"measured: {report.label}",
        f"{'task':<22}{'metric':<18}{'n':>6}{'k':>4}{'score':>8}{'s.e.':>7}{'K2.5*':>8}",
        f"{task.name:<22}{task.scoring().metric:<18}{report.average.num_problems:>6}{report.average.num_samples:>4}"
        f"{report.score:>8.2f}{spread:>7}{reference:>8}",
        *(f"note: {remark}" for remark in report.remarks),
    ]
    if task.reference is not None:
        lines.append(f"* of Kimi K2.5 as its makers report it ({task.source}); not measured here")
    return "\n".join(lines)


def task_table() -> str:
    """One line a task."""
    lines = [f"{'task':<24}{'benchmark':<40}{'metric or what it needs':<26}{'k':>3}{'T':>5}{'tokens':>7}{'K2.5*':>7}"]
    group = ""
    for task in tasks():
        if task.group != group:
            group = task.group
            lines.append(f"-- {group}")
        reference = "" if task.reference is None else f"{task.reference:.1f}"
        if task.rule is None or task.needs:
            lines.append(f"{task.name:<24}{task.title:<40}{'not run here':<41}{reference:>7}  needs {task.needs}")
        else:
            settings = f"{task.num_samples:>3}{task.temperature:>5.1f}{task.max_tokens:>7}"
            lines.append(f"{task.name:<24}{task.title:<40}{task.rule.metric:<26}{settings}{reference:>7}")
            lines.append(f"{'':<24}answer: {task.rule.answers}" + (f"; {task.remark}" if task.remark else ""))
    lines.append(f"* of Kimi K2.5 as its makers report it ({REPORT}); not measured here")
    return "\n".join(line.rstrip() for line in lines)
