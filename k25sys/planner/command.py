"""`python -m k25sys plan`: flags to a request, a request to a plan, a plan to a table and files."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from k25sys.errors import ArgumentValueError, message
from k25sys.parallel.pipeline.drawing import draw_svg
from k25sys.parallel.pipeline.tracer import write_perfetto
from k25sys.planner.hardware import hardware
from k25sys.planner.plan import Plan, make_plan
from k25sys.planner.report import table
from k25sys.planner.request import PlanRequest

_SWEPT = ("pp", "vpp", "ep", "tp", "cp", "microbatches", "schedule", "recompute", "vision", "vision_share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of INTERFACES, "Planner"."""
    default = {name: item.default for name, item in PlanRequest.__dataclass_fields__.items()}
    parser.add_argument("--preset", default=default["preset"])
    parser.add_argument("--gpus", type=int, required=True)
    for name in ("pp", "vpp", "ep", "tp", "cp", "microbatches", "sequence", "seed"):
        parser.add_argument(f"--{name}", type=int, default=default[name])
    for name in ("schedule", "recompute", "vision"):
        parser.add_argument(f"--{name}", default=default[name])
    parser.add_argument("--hardware", default="h800", help="h800, h100 or h200")
    parser.add_argument("--calibration", metavar="FILE", help="JSON of measured numbers in place of the preset's")
    parser.add_argument("--vision-share", type=float, default=0.0, help="media tokens of all tokens")
    parser.add_argument("--video-share", type=float, default=0.0, help="videos among the sequences with media")
    parser.add_argument("--uniform", action="store_true", help="equal stages and free links, as closed forms have it")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FLAG=A,B,...", help=f"plans for each; {', '.join(_SWEPT)}"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--svg", metavar="FILE", help="the schedule, drawn")
    parser.add_argument("--perfetto", metavar="FILE", help="the schedule for ui.perfetto.dev")


def run(arguments: argparse.Namespace) -> str:
    """The table; writes what was asked for.

    Raises:
        ValueError: an impossible run; OSError: a file that cannot be written or read.
    """
    if arguments.sweep:
        plans = [make_plan(request) for request in _sweep(_request(arguments), arguments.sweep)]
        if arguments.json:
            Path(arguments.json).write_text(json.dumps([_labelled(plan) for plan in plans], indent=2))
        return _sweep_table(plans)
    plan = make_plan(_request(arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(plan.to_json(), indent=2))
    if arguments.svg:
        Path(arguments.svg).write_text(draw_svg(plan.timeline))
    if arguments.perfetto:
        write_perfetto(plan.timeline, arguments.perfetto)
    return table(plan)


def _request(arguments: argparse.Namespace) -> PlanRequest:
    measured = json.loads(Path(arguments.calibration).read_text()) if arguments.calibration else {}
    names = [name for name in PlanRequest.__dataclass_fields__ if name != "hardware"]
    given = {name: getattr(arguments, name) for name in names}
    return PlanRequest(**given, hardware=hardware(arguments.hardware, **measured))


def _sweep(request: PlanRequest, sweeps: list[str]) -> list[PlanRequest]:
    requests = [request]
    for text in sweeps:
        name, found, values = text.partition("=")
        name = name.lstrip("-").replace("-", "_")
        if not found or name not in _SWEPT:
            accepted = f"FLAG=A,B,... with one of {', '.join(_SWEPT)}"
            raise ArgumentValueError(message("plan", "--sweep", repr(text), accepted))
        kind = type(getattr(request, name))
        try:
            parsed = [kind(value) for value in values.split(",")]
        except ValueError:
            accepted = f"values of type {kind.__name__}"
            raise ArgumentValueError(message("plan", f"--sweep {name}", repr(values), accepted)) from None
        requests = [replace(each, **{name: value}) for each in requests for value in parsed]
    return requests


def _labelled(plan: Plan) -> dict[str, object]:
    request = {name: getattr(plan.request, name) for name in _SWEPT}
    return {"request": request, **plan.to_json()}


def _sweep_table(plans: list[Plan]) -> str:
    """One line a plan, fastest first; those that do not fit last."""
    lines = ["simulated, fastest first; * does not fit", "    tok/s/GPU    MFU  bubble  vs text   GB  binds        run"]

    def order(plan: Plan) -> tuple[bool, float]:
        return plan.largest_memory > plan.request.hardware.memory_bytes, -plan.tokens_per_second_per_gpu

    for plan in sorted(plans, key=order):
        run_of = " ".join(f"{name}={getattr(plan.request, name)}" for name in _SWEPT)
        lines.append(
            f"{'*' if order(plan)[0] else ' '} {plan.tokens_per_second_per_gpu:11.1f} {plan.mfu:6.1%} "
            f"{plan.bubble:7.2%} {plan.efficiency_vs_text:8.3f} {plan.largest_memory / 1e9:4.0f}  "
            f"{plan.binds:<12} {run_of}"
        )
    return "\n".join(lines)
