"""Where the numbers of a run go: metrics.jsonl always, and on request TensorBoard, wandb and a progress line."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from k25sys.errors import FileFormatError, OptionalPackageError, message
from k25sys.training.config import ReportOptions

METRICS = "metrics.jsonl"


class Writer(Protocol):
    """Gets the numbers of every step."""

    def write(self, metrics: Mapping[str, Any]) -> None:
        """One step's: "step", and JSON values by name."""
        ...

    def close(self) -> None:
        """After the last one."""
        ...


class JsonLines:
    """One object a step; it is on its way to the disk when `write` returns. Lines after `resumed_at` are cut off.

    Raises:
        FileFormatError: a line before the last is no JSON object with a step.
    """

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        kept = _lines_until(path, resumed_at) if path.exists() else []
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self._file = open(path, "a")  # noqa: SIM115  (closed by close)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Numbers in full precision; what is not finite becomes null."""
        self._file.write(json.dumps(_finite(metrics)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    kept: list[str] = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            at = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break  # the process died while it wrote
            got = f"line {number}: {line[:40]!r}"
            raise FileFormatError(message("run", str(path), got, "one JSON object with a step a line")) from None
        if at <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Scalars as events, in the folder `tensorboard`; those after `resumed_at` are withdrawn.

    Raises:
        OptionalPackageError: it is not installed.
    """

    def __init__(self, folder: Path, *, resumed_at: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Every number."""
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class Wandb:
    """An offline run in the folder `wandb`, for `wandb sync`; each resume of a run adds one to its group.

    Raises:
        OptionalPackageError: it is not installed.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("wandb") from error
        self._run = wandb.init(
            mode="offline", dir=str(folder), config=dict(config), project="k25sys", group=folder.name
        )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Every number."""
        self._run.log(_numbers(metrics), step=metrics["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Progress:
    """A bar with the latest numbers on a terminal, a line every tenth of the run elsewhere; needs rich for the bar."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._bar = steps, None
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        if bar.console.is_terminal:
            bar.start()
            self._bar, self._task = bar, bar.add_task("", total=steps, completed=done)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """The latest."""
        step = metrics["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=_summary(metrics))
        elif step == 1 or step == self._steps or step % max(1, self._steps // 10) == 0:
            print(f"step {step}/{self._steps}  {_summary(metrics)}", flush=True)

    def close(self) -> None:
        """Leaves the last line."""
        if self._bar is not None:
            self._bar.stop()


def _summary(metrics: Mapping[str, Any]) -> str:
    mfu = metrics.get("mfu")
    return (
        f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
        f"{'' if mfu is None else f'MFU {mfu:.1%}  '}gradient {metrics['gradient_norm']:.3f}  "
        f"expert load {metrics['expert_load_max_over_mean']:.2f}  heads clipped {metrics['heads_clipped']}"
    )


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def _missing(package: str) -> OptionalPackageError:
    hint = f"pip install {package}, or --set report.{package}=false"
    return OptionalPackageError(message("run", f"report.{package}", "true", f"{package} to be installed", hint))


def open_writers(
    folder: Path, options: ReportOptions, config: Mapping[str, Any], *, steps: int, resumed_at: int
) -> list[Writer]:
    """Those of a run, on the rank that reports."""
    writers: list[Writer] = [JsonLines(folder / METRICS, resumed_at=resumed_at)]
    if options.tensorboard:
        writers.append(TensorBoard(folder, resumed_at=resumed_at))
    if options.wandb:
        writers.append(Wandb(folder, config))
    if options.progress:
        writers.append(Progress(steps, resumed_at))
    return writers
