"""Early, mid and late fusion at equal budgets of vision and of text (K2.5 report, table 1 and appendix B.1).

    python -m k25sys run fusion_ablation --output DIR [--steps N] [--set seeds=0,1,2] [--set figure=FILE.svg]

Every arm sees the same share of vision tokens: from the start, from 50%, or from 80% of the run on, at a ratio of
budget / (1 - inject). Losses of held-out text and vision are measured along the way. The report shows text to dip and
recover after a late injection; here the rise of the text loss after it is measured against the arm without one.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from k25sys.data import ByteTokenizer
from k25sys.errors import OptionalPackageError, message
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
        """At the end."""
        return self.losses[max(self.losses)]

    def rise(self, inject_step: float) -> float:
        """How far text rises above its loss at the injection, at most; <= 0: it never does."""
        before = max((step for step in self.losses if step <= inject_step), default=min(self.losses))
        later = [losses["text"] for step, losses in self.losses.items() if step > before]
        return max(later) - self.losses[before]["text"] if later else 0.0


def run(arguments: argparse.Namespace) -> str:
    """All arms and seeds, one after the other; curves.json, the table, and the figure."""
    settings = dict(assignment.partition("=")[::2] for assignment in arguments.set)
    seeds = [int(seed) for seed in settings.pop("seeds", "0,1,2").split(",")]
    figure = settings.pop("figure", None)
    base = override(_config(arguments.preset, arguments.steps or STEPS), [f"{k}={v}" for k, v in settings.items()])
    output = Path(arguments.output)
    curves = [_train(base, arm, seed, output, arguments.resume) for seed in seeds for arm in ARMS]
    rows = [{"arm": c.arm, "seed": c.seed, "losses": c.losses} for c in curves]
    (output / "curves.json").write_text(json.dumps({"steps": base.steps, "budget": BUDGET, "curves": rows}, indent=1))
    if figure is not None:
        draw(figure, curves, base.steps)
    return table(curves, base.steps)


def _config(preset_name: str, steps: int) -> RunConfig:
    base = pretrain.config(preset_name)
    return replace(
        base, recipe=NAME, steps=steps, batch=replace(base.batch, sequences=4),
        data=replace(base.data, vision_budget=BUDGET),
        validation=ValidationOptions(every=max(1, steps // POINTS), batches=4),
        checkpoint=CheckpointOptions(every=steps), report=ReportOptions(progress=False),
    )  # fmt: skip


def _train(base: RunConfig, arm: str, seed: int, output: Path, resume: bool) -> Curve:
    config = replace(base, seed=seed, data=replace(base.data, inject=ARMS[arm]))
    tokenizer, folder = ByteTokenizer(), output / f"{arm}-{seed}"
    trainer = Trainer(
        config, preset(config.preset), pretrain.mixture(config, tokenizer, folder), RankGrid.create(GridSizes()),
        folder, validation=held_out_of(replace(config, seed=0), tokenizer),
    )  # fmt: skip
    trainer.run(resume=resume)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = Curve(arm=arm, seed=seed, losses={x["step"]: x["validation"] for x in lines if "validation" in x})
    print(f"{arm}, seed {seed}: text {curve.final['text']:.4f}, vision {curve.final['vision']:.4f}", flush=True)
    return curve


def table(curves: Sequence[Curve], steps: int) -> str:
    """Means over seeds with their standard deviations; the rise of text after each injection."""
    lines = [f"{'arm':6} {'inject':>6}  {'text loss':>16}  {'vision loss':>16}  {'rise of text after injection':>28}"]
    for arm, inject in ARMS.items():
        chosen = [curve for curve in curves if curve.arm == arm]
        cells = [_spread([curve.final[kind] for curve in chosen]) for kind in ("text", "vision")]
        rise = "" if inject == 0 else _spread([curve.rise(inject * steps) for curve in chosen])
        lines.append(f"{arm:6} {inject:6.0%}  {cells[0]:>16}  {cells[1]:>16}  {rise:>28}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"


def draw(path: str, curves: Sequence[Curve], steps: int) -> None:
    """Both losses over steps: a thin line for each seed, a thick one for their mean.

    Raises:
        OptionalPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        hint = "pip install matplotlib, or leave --set figure=... out"
        raise OptionalPackageError(message("run", "figure", path, "matplotlib to be installed", hint)) from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "k25sys"
    from matplotlib import pyplot

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
