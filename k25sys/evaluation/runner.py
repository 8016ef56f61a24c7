"""A task over rows: prompts out, replies in, scores and what they average to."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from k25sys.errors import ArgumentValueError, FileFormatError, message
from k25sys.evaluation.engine import Engine, Reply, Sampling
from k25sys.evaluation.estimates import Average, average_at_k
from k25sys.evaluation.rows import Prompt, Row, row_error
from k25sys.evaluation.tasks import Task, tasks

_SETTINGS = ("num_samples", "temperature", "top_p", "max_tokens", "mode", "frames", "frame_side")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row and its samples."""

    id: str
    scores: tuple[float, ...]
    """0 to 1, one a sample."""
    replies: tuple[Reply, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a model did on the rows of a task."""

    task: Task
    label: str
    """What was evaluated, in the caller's words."""
    average: Average
    """Over rows, or over pairs of rows where the task pairs them."""
    items: tuple[Item, ...]

    @property
    def score(self) -> float:
        """In percent."""
        return 100 * self.average.mean

    @property
    def standard_error(self) -> float | None:
        """In percent; None of a single row."""
        error = self.average.standard_error
        return None if error is None else 100 * error

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before comparing the score with another."""
        published = {task.name: task for task in tasks()}.get(self.task.name)
        found = [self.task.remark] if self.task.remark else []
        for name in _SETTINGS:
            mine, theirs = getattr(self.task, name), getattr(published, name, None)
            if published is not None and mine != theirs:
                found.append(f"{name} {mine} instead of {theirs}")
        replies = [reply for item in self.items for reply in item.replies]
        cut = sum(not reply.is_complete for reply in replies)
        if cut:
            found.append(f"{cut} of {len(replies)} replies were cut at max_tokens")
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it; scores of items are 0 to 1."""
        return {
            "label": self.label,
            "task": self.task.name,
            "metric": self.task.scoring().metric,
            "n": self.average.num_problems,
            "k": self.average.num_samples,
            "score": self.score,
            "standard_error": self.standard_error,
            "settings": {name: getattr(self.task, name) for name in _SETTINGS},
            "remarks": self.remarks,
            "reference": {"model": "Kimi K2.5", "score": self.task.reference, "source": self.task.source}
            if self.task.reference is not None
            else None,
            "items": [
                {"id": item.id, "scores": item.scores, "replies": [reply._asdict() for reply in item.replies]}
                for item in self.items
            ],
        }


def evaluate(
    task: Task,
    rows: Sequence[Row],
    engine: Engine,
    *,
    label: str = "",
    file: str | Path = "rows",
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Asks `engine` the rows' questions, task.num_samples times each, and scores the replies by the task's rule.

    Args:
        task: what to do; `dataclasses.replace(task, num_samples=...)` for other settings, which the report then says.
        rows: the questions, in the order in which they are asked.
        engine: where replies come from.
        label: what is evaluated; kept in the report.
        file: what an error of a row calls their file.
        batch: rows that the engine gets at once.
        on_progress: called after each batch with the rows done and the rows there are.

    Raises:
        ValueError: a task that needs more than rules, no rows, a row whose answer the rule does not take, a row without
            its partner where the task pairs them, or an engine that does not give the replies it was asked for.
    """
    rule = task.scoring()
    check_rows(task, rows, file)
    if batch < 1:
        raise ArgumentValueError(message("evaluate", "batch", batch, "an int >= 1"))
    common = {field.name: getattr(task, field.name) for field in fields(Sampling)}
    sampling, items = Sampling(**common), []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        try:
            replies = engine.generate([prompt_of(row, rule.instruction) for row in some], sampling)
        except ValueError as error:  # of media or lengths, which the engine knows by their place in the batch
            raise FileFormatError(f"evaluate: {file} lines {some[0].line} to {some[-1].line}: {error}") from error
        if [len(each) for each in replies] != [task.num_samples] * len(some):
            got = f"{[len(each) for each in replies]} replies"
            raise ArgumentValueError(message("evaluate", "engine", got, f"{task.num_samples} to each of {len(some)}"))
        for row, mine in zip(some, replies, strict=True):
            scores = tuple(rule.score(reply.text, row) for reply in mine)
            items.append(Item(id=row.id, scores=scores, replies=tuple(mine)))
        if on_progress:
            on_progress(len(items), len(rows))
    average = average_at_k(_paired(task, rows, [item.scores for item in items]))
    return Report(task=task, label=label, average=average, items=tuple(items))


def check_rows(task: Task, rows: Sequence[Row], file: str | Path) -> None:
    """Raises ValueError for rows that the task cannot be scored on; see `evaluate`."""
    rule = task.scoring()
    if not rows:
        raise ArgumentValueError(message("evaluate", "rows", "none", "at least one"))
    for row in rows:
        if not rule.takes(row):
            got = f"answer {str(row.answer)[:80]!r} with {row.num_choices} choices"
            raise row_error(file, row.line, got, f"{rule.answers} ({task.name})")
    if task.pair_field:
        members: dict[str, list[Row]] = {}
        for row in rows:
            if task.pair_field not in row.fields:
                raise row_error(file, row.line, f"no {task.pair_field}", f"{task.pair_field} in each row ({task.name})")
            members.setdefault(str(row.fields[task.pair_field]), []).append(row)
        for name, mine in members.items():
            if len(mine) != 2:
                got = f"{len(mine)} rows of {task.pair_field} {name!r}"
                raise row_error(file, mine[-1].line, got, "2 (a limit must not part a pair)")


def prompt_of(row: Row, instruction: str = "") -> Prompt:
    """The row's prompt, its choices with letters, and the instruction."""
    below = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, row.choices, strict=False)]
    blocks = ["\n".join(below)] if below else []
    blocks += [instruction] if instruction else []
    parts = list(row.prompt)
    if blocks and isinstance(parts[-1], str):
        parts[-1] = "\n\n".join([parts[-1], *blocks])
    elif blocks:
        parts.append("\n\n".join(blocks))
    return tuple(parts)


def _paired(task: Task, rows: Sequence[Row], scores_NK: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Scores of pairs, the worse of the two in each sample; of rows where the task pairs none."""
    if not task.pair_field:
        return scores_NK
    pairs: dict[str, list[tuple[float, ...]]] = {}
    for row, scores in zip(rows, scores_NK, strict=True):
        pairs.setdefault(str(row.fields[task.pair_field]), []).append(scores)
    return [tuple(map(min, zip(*mine, strict=True))) for mine in pairs.values()]
