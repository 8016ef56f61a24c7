"""Early, mid and late fusion at equal budgets of vision and of text (K2.5 report, table 1 and appendix B.1).

    python -m k25sys run fusion_ablation --output DIR [--steps N] [--set seeds=0,1,2] [--set figure=FILE.svg]

Every arm sees the same share of vision tokens: from the start, from 50%, or from 80% of the run on, at a ratio of
budget / (1 - inject). Losses of held-out text and vision are measured along the way. The report shows text to dip and
recover after a late injection; here that is looked for as the distance to the early arm of the same seed.
"""

import argparse
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from k25sys.data import ByteTokenizer
from k25sys.errors import ConfigError, OptionalPackageError, message
from k25sys.models.presets import preset
from k25sys.parallel import GridSizes, RankGrid
from k25sys.recipes import pretrain
from k25sys.recipes.corpus import held_out_of
from k25sys.training.config import CheckpointOptions, ReportOptions, RunConfig, ValidationOptions, override
from k25sys.training.loop import Trainer

NAME = "fusion_ablation"
SUMMARY = "early, mid and late injection of vision at equal budgets, several seeds, with a figure"
ARMS = {"early": 0.0, "mid": 0.5, "late": 0.8}
"""The share of the run before the first vision token."""
BUDGET = 0.1
STEPS, POINTS = 240, 24


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run: losses of held-out documents, by step."""

    arm: str
    seed: int
    losses: Mapping[int, Mapping[str, float]]

    @property
    def final(self) -> Mapping[str, float]:
        """The last that were measured."""
        return self.losses[max(self.losses)]

    def text_around(self, inject_step: float) -> tuple[float, float, float]:
        """Means of two measurements of text each: the last before an injection, the first after it, the last of all."""
        steps = sorted(self.losses)
        before = bisect_right(steps, inject_step)
        places = (steps[max(0, before - 2) : max(1, before)], steps[before : before + 2] or steps[-1:], steps[-2:])
        first, second, third = (mean(self.losses[step]["text"] for step in each) for each in places)
        return first, second, third


def run(arguments: argparse.Namespace) -> str:
    """All arms and seeds, one after the other; curves.json, the table, and the figure. A SIGTERM ends it, saved.

    Raises:
        ConfigError: what cannot be, before anything is trained. OptionalPackageError: a figure without matplotlib.
    """
    settings = dict(assignment.partition("=")[::2] for assignment in arguments.set)
    seeds, figure = _seeds(settings.pop("seeds", "0,1,2")), settings.pop("figure", None)
    steps = STEPS if arguments.steps is None else arguments.steps
    base = override(_config(arguments.preset, steps), [f"{k}={v}" for k, v in settings.items()])
    _check(base, settings, figure)
    output = Path(arguments.output)
    curves = []
    for seed in seeds:
        for arm in ARMS:
            curve = _train(base, arm, seed, output, arguments.resume)
            if curve is None:
                return f"{output}: stopped when asked to, in {arm}-{seed}; --resume goes on"
            curves.append(curve)
    rows = [{"arm": c.arm, "seed": c.seed, "losses": c.losses} for c in curves]
    contents = {"steps": base.steps, "budget": base.data.vision_budget, "curves": rows}
    (output / "curves.json").write_text(json.dumps(contents, indent=1))
    if figure is not None:
        draw(figure, curves, base.steps)
    return table(curves, base.steps)


def _seeds(text: str) -> list[int]:
    seeds = text.split(",")
    if not all(seed.isascii() and seed.isdigit() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(message("run", "seeds", repr(text), "whole numbers, all different, as 0,1,2"))
    return [int(seed) for seed in seeds]


def _check(base: RunConfig, settings: Mapping[str, str], figure: str | None) -> None:
    budget, every, world_size = base.data.vision_budget, base.validation.every, os.environ.get("WORLD_SIZE", "1")
    most = 1 - max(ARMS.values())
    if world_size != "1":
        hint = "its runs are small: start several commands, each with its own seeds and --output"
        raise ConfigError(message("run", "processes", world_size, "1", hint))
    if budget is None or not 0 < budget <= most + 1e-9:
        raise ConfigError(
            message("run", "data.vision_budget", budget, f"above 0, at most {most:.1f}, which the late arm can hold")
        )
    if every is None or every > base.steps:
        raise ConfigError(message("run", "validation.every", every, f"1 to {base.steps}, the number of steps"))
    for name in ("data.inject", "seed"):
        if name in settings:
            raise ConfigError(message("run", "--set", name, "another field: the arms and seeds=... decide about it"))
    if figure is not None:
        if not Path(figure).absolute().parent.is_dir():
            raise ConfigError(message("run", "figure", figure, "a file in a folder that is there"))
        _pyplot(figure)


def _config(preset_name: str, steps: int) -> RunConfig:
    if preset_name not in ("tiny", "small"):
        raise ConfigError(message("run", "--preset", repr(preset_name), "tiny, small: nine runs follow one another"))
    base = pretrain.config(preset_name)
    return replace(
        base, recipe=NAME, steps=steps, batch=replace(base.batch, sequences=4),
        data=replace(base.data, vision_budget=BUDGET),
        validation=ValidationOptions(every=max(1, steps // POINTS), batches=4),
        checkpoint=CheckpointOptions(every=max(1, steps)), report=ReportOptions(progress=False),
    )  # fmt: skip


def _train(base: RunConfig, arm: str, seed: int, output: Path, resume: bool) -> Curve | None:
    """One run; None: it was asked to stop."""
    config = replace(base, seed=seed, data=replace(base.data, inject=ARMS[arm]))
    tokenizer, folder = ByteTokenizer(), output / f"{arm}-{seed}"
    trainer = Trainer(
        config, preset(config.preset), pretrain.mixture(config, tokenizer, folder), RankGrid.create(GridSizes()),
        folder, validation=held_out_of(replace(config, seed=0), tokenizer),
    )  # fmt: skip
    if trainer.run(resume=resume) < config.steps:
        return None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = Curve(arm=arm, seed=seed, losses={x["step"]: x["validation"] for x in lines if "validation" in x})
    print(f"{arm}, seed {seed}: text {curve.final['text']:.4f}, vision {curve.final['vision']:.4f}", flush=True)
    return curve


def table(curves: Sequence[Curve], steps: int) -> str:
    """Final losses, and how much the text of an arm is above that of the early one of the same seed: before vision
    comes, right after, and at the end. A dip that recovers is a second figure above the first and the third."""
    heads = ("text loss", "vision loss", "text over early: before", "after", "at the end")
    lines = [f"{'arm':6} {'inject':>6}  " + "  ".join(f"{head:>23}" for head in heads)]
    early = {curve.seed: curve for curve in curves if ARMS[curve.arm] == 0}
    for arm, inject in ARMS.items():
        chosen = [curve for curve in curves if curve.arm == arm]
        cells = [_spread([curve.final[kind] for curve in chosen]) for kind in ("text", "vision")]
        if inject:
            around = [(c.text_around(inject * steps), early[c.seed].text_around(inject * steps)) for c in chosen]
            cells += [_spread([ours[i] - theirs[i] for ours, theirs in around]) for i in range(3)]
        lines.append(f"{arm:6} {inject:6.0%}  " + "  ".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"


def _pyplot(path: str) -> Any:
    try:
        import matplotlib
    except ImportError as error:
        hint = "pip install matplotlib, or leave --set figure=... out"
        raise OptionalPackageError(message("run", "figure", path, "matplotlib to be installed", hint)) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "k25sys"
    from matplotlib import pyplot

    return pyplot


def draw(path: str, curves: Sequence[Curve], steps: int) -> None:
    """Both losses over steps: a thin line for each seed, a thick one for their mean.

    Raises:
        OptionalPackageError: matplotlib is not installed.
    """
    pyplot = _pyplot(path)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, kind in zip(axes, ("text", "vision"), strict=True):
        for arm, colour in zip(ARMS, ("tab:green", "tab:blue", "tab:red"), strict=True):
            chosen: list[Any] = [curve for curve in curves if curve.arm == arm]
            at = sorted(chosen[0].losses)
            for curve in chosen:
                axis.plot(at, [curve.losses[step][kind] for step in at], color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(at, [mean(c.losses[step][kind] for c in chosen) for step in at], color=colour, label=arm)
            if ARMS[arm]:
                axis.axvline(ARMS[arm] * steps, color=colour, linestyle=":", linewidth=0.8)
        axis.set(xlabel="step", ylabel=f"loss of held-out {kind}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
