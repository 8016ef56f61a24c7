"""`python -m k25sys plan`: flags to a request, a request to a plan, a plan to a table and files."""

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from k25sys.errors import ArgumentValueError, ConfigError, GridError, ScheduleError, message
from k25sys.parallel.pipeline.drawing import draw_svg
from k25sys.parallel.pipeline.tracer import write_perfetto
from k25sys.planner.arguments import SWEPT
from k25sys.planner.hardware import hardware
from k25sys.planner.plan import Plan, make_plan
from k25sys.planner.report import table
from k25sys.planner.request import PlanRequest


def run(arguments: argparse.Namespace) -> str:
    """The table; writes what was asked for.

    Raises:
        ValueError: an impossible run, in a sweep if no other is possible; OSError: a file that cannot be written or
            read.
    """
    if arguments.sweep:
        return _run_sweep(arguments)
    plan = make_plan(PlanRequest(**_fields(arguments)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(plan.to_json(), indent=2))
    if arguments.svg:
        Path(arguments.svg).write_text(draw_svg(plan.timeline))
    if arguments.perfetto:
        write_perfetto(plan.timeline, arguments.perfetto)
    return table(plan)


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of a PlanRequest."""
    measured = _calibration(arguments.calibration) if arguments.calibration else {}
    given = {name: getattr(arguments, name) for name in PlanRequest.__dataclass_fields__ if name != "hardware"}
    return {**given, "hardware": hardware(arguments.hardware, **measured)}


def _calibration(path: str) -> dict[str, Any]:
    accepted = "a JSON object of the hardware's numbers by name"
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArgumentValueError(message("plan", "--calibration", f"{path}: {error}", accepted)) from None
    if not isinstance(measured, dict):
        raise ArgumentValueError(message("plan", "--calibration", f"{path}: a {type(measured).__name__}", accepted))
    return measured


@dataclass(frozen=True)
class _Refused:
    """An impossible point of a sweep."""

    fields: dict[str, Any]
    reason: str


def _run_sweep(arguments: argparse.Namespace) -> str:
    for flag in ("svg", "perfetto"):
        if getattr(arguments, flag):
            hint = "draw one run, without --sweep"
            raise ArgumentValueError(message("plan", f"--{flag}", "a file beside --sweep", "no drawing", hint))
    plans: list[Plan] = []
    refused: list[_Refused] = []
    for fields in _sweep(_fields(arguments), arguments.sweep):
        try:
            plans.append(make_plan(PlanRequest(**fields)))
        except (ArgumentValueError, ConfigError, GridError, ScheduleError) as error:
            refused.append(_Refused(fields, str(error)))
    if not plans:
        got, first = f"{len(refused)} impossible runs", f"the first is refused with: {refused[0].reason}"
        raise ArgumentValueError(message("plan", "--sweep", got, "a possible one among them", first))
    if arguments.json:
        rows = [*map(_labelled, plans), *({"request": _swept(of.fields), "refused": of.reason} for of in refused)]
        Path(arguments.json).write_text(json.dumps(rows, indent=2))
    return _sweep_table(plans, refused)


def _sweep(fields: dict[str, Any], sweeps: list[str]) -> list[dict[str, Any]]:
    """The fields of every run: all combinations of the swept values."""
    values_of: dict[str, list[Any]] = {}
    for text in sweeps:
        name, found, values = text.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not found or name not in SWEPT:
            accepted = f"FLAG=A,B,... with one of {', '.join(SWEPT)}"
            raise ArgumentValueError(message("plan", "--sweep", repr(text), accepted))
        if name in values_of:
            accepted = f"{name} once, with all of its values"
            raise ArgumentValueError(message("plan", "--sweep", f"{name} a second time", accepted))
        kind = type(fields[name])
        try:
            values_of[name] = [kind(value) for value in values.split(",")]
        except ValueError:
            accepted = f"values of type {kind.__name__}"
            raise ArgumentValueError(message("plan", f"--sweep {name}", repr(values), accepted)) from None
    return [{**fields, **dict(zip(values_of, point, strict=True))} for point in product(*values_of.values())]


def _swept(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in SWEPT}


def _labelled(plan: Plan) -> dict[str, object]:
    return {"request": _swept(vars(plan.request)), **plan.to_json()}


def _run_of(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={fields[name]}" for name in SWEPT)


def _sweep_table(plans: list[Plan], refused: list[_Refused]) -> str:
    """One line a plan, fastest first; those that do not fit next, and last those that are impossible."""
    lines = ["simulated, fastest first; * does not fit", "    tok/s/GPU    MFU  bubble  vs text   GB  binds        run"]

    def order(plan: Plan) -> tuple[bool, float]:
        return plan.largest_memory > plan.request.hardware.memory_bytes, -plan.tokens_per_second_per_gpu

    for plan in sorted(plans, key=order):
        lines.append(
            f"{'*' if order(plan)[0] else ' '} {plan.tokens_per_second_per_gpu:11.1f} {plan.mfu:6.1%} "
            f"{plan.bubble:7.2%} {plan.efficiency_vs_text:8.3f} {plan.largest_memory / 1e9:4.0f}  "
            f"{plan.binds:<12} {_run_of(vars(plan.request))}"
        )
    lines += [f"  refused: {each.reason}  {_run_of(each.fields)}" for each in refused]
    return "\n".join(lines)
