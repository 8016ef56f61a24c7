"""The training loop: data, step, metrics, checkpoints, signals; the same on one process and on a grid."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from k25sys.data import Mixture
from k25sys.errors import CheckpointError, ConfigError, DivergenceError, listing, message
from k25sys.models import KimiK25Config
from k25sys.parallel import RankGrid
from k25sys.parallel.faults import Monitor
from k25sys.planner.costs import text_work, vision_work
from k25sys.planner.hardware import hardware
from k25sys.training.batches import StepBatch
from k25sys.training.checkpointing import Checkpoints
from k25sys.training.config import RunConfig, flattened
from k25sys.training.metrics import Writer, open_writers
from k25sys.training.profiling import ProfiledRecorder, profile
from k25sys.training.setup import Parts, build
from k25sys.training.step import StepOutcome
from k25sys.training.weights import load_weights, stored_config

_MOST_SKIPPED = 10
"""Steps in a row whose gradients were not finite."""
_MAY_DIFFER = (
    "steps", "grid.", "pipeline.", "vision.", "checkpoint.", "report.", "validation.", "data.workers", "optimizer.",
)  # fmt: skip
"""Of a run that is resumed: what changes no data and no numbers of the past."""
_MAY_NOT = ("optimizer.frozen",)
"""Nevertheless: it decides which state there is."""


class Trainer:
    """One run.

    Args:
        config: see RunConfig.
        model_config: the model that its preset, or its recipe, means.
        mixture: what it reads.
        grid: of all ranks.
        validation: by kind, documents that are held out; see config.validation.
        output: the folder of its files (INTERFACES, "Running a recipe"), shared by all ranks.
        monitor: names the rank at fault when a wait for another one fails.
    """

    def __init__(
        self,
        config: RunConfig,
        model_config: KimiK25Config,
        mixture: Mixture,
        grid: RankGrid,
        output: str | os.PathLike[str],
        *,
        validation: Mapping[str, Mixture] | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        config = _resolved(config, grid)
        if config.report.profile_step is not None and config.report.profile_step > config.steps:
            raise ConfigError(message("run", "report.profile_step", config.report.profile_step, f"1 to {config.steps}"))
        if config.validation.every is not None and not validation:
            accepted = f"null: {config.recipe} holds nothing out, or its files have too few documents"
            raise ConfigError(message("run", "validation.every", config.validation.every, accepted))
        self.config, self.grid, self.output = config, grid, Path(output)
        self._recorder = None if config.report.profile_step is None else ProfiledRecorder()
        self.parts: Parts = build(
            config, model_config, mixture, grid, validation=validation, monitor=monitor, recorder=self._recorder
        )  # fmt: skip
        options = config.checkpoint
        self.output.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(
            self.output / "checkpoints", grid, every=options.every, keep=options.keep, asynchronous=options.asynchronous
        )
        self._stop_asked, self._patches, self._skipped = False, 0, 0

    def run(self, *, resume: bool = False) -> int:
        """Trains up to config.steps, and saves the last one. Collective over the grid.

        A SIGTERM, or a first SIGINT, ends it after the step that it comes in, saved. A save that fails is reported in a
        line, and the next one tried when it is due; only that of the last step must not fail. Steps whose gradients are
        not finite update nothing and are passed over. An op that refuses what is not finite, as the router does on the
        CPU, ends the run before the update.

        Args:
            resume: goes on from the newest intact checkpoint, or from the start where there is none.

        Returns:
            The step that it ended with.

        Raises:
            ConfigError: a folder that holds another run, or more steps of this one. CheckpointError: no checkpoint is
            intact, or the last one could not be written. DivergenceError: gradients were not finite for ten steps in a
            row.
        """
        done = self._begin(resume)
        self._write_json("config.json", self.config.to_json())
        writers = self._writers(done)
        previous = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            step = done
            while step < self.config.steps:
                step += 1
                stopping = self._one_step(step, writers)
                if stopping or step == self.config.steps or self.checkpoints.due(step):
                    self._save(step, is_last=stopping or step == self.config.steps)
                if stopping:
                    break
            self.checkpoints.wait()
            if step > done:
                self._write_ranks()
            return step
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for writer in writers:
                writer.close()
            self.parts.reader.close()

    # --- beginning --------------------------------------------------------------------------------------------------

    def _begin(self, resume: bool) -> int:
        """The step that this run has already done."""
        parts, start_from = self.parts, self.config.checkpoint.start_from
        if resume:
            self._check_same_run(self._config_of_newest())
        loaded = self.checkpoints.load_latest(parts.model, parts.optimizer) if resume else None
        if loaded is None:
            if not resume and self.checkpoints.steps():
                hint = "--resume goes on with it, or choose another --output"
                raise ConfigError(message("run", "--output", f"{self.output}, which holds a run", "a new folder", hint))
            if start_from:
                left = load_weights(start_from, self.grid, parts.model, parts.optimizer)
                if left:
                    self._say(f"run: no checkpoint.start_from has {listing(left)}: begun from the seed")
            return 0
        self._check_same_run(loaded.extra["config"])
        if loaded.step > self.config.steps:
            accepted = f"at least {loaded.step}, which the run has done"
            raise ConfigError(message("run", "steps", self.config.steps, accepted))
        parts.reader.restore(loaded.extra["data"])
        return loaded.step

    def _config_of_newest(self) -> Mapping[str, Any]:
        """Of the newest checkpoint whose index can be read; nothing where there is none: loading says why."""
        for step in self.checkpoints.steps():
            with suppress(CheckpointError, OSError, KeyError, TypeError):
                return dict(stored_config(self.checkpoints.folder / f"step-{step:08d}"))
        return {}

    def _check_same_run(self, config: Mapping[str, Any]) -> None:
        """Raises ConfigError unless a run of `config` may be gone on with."""
        before, now = flattened(config), flattened(self.config.to_json())
        may_differ = (
            _MAY_DIFFER[1:] if self.config.data.inject else _MAY_DIFFER
        )  # the injection is a share of the steps
        changed = [
            f"{path}={value!r}, it was {before[path]!r}"
            for path, value in now.items()
            if path in before and before[path] != value and (not path.startswith(may_differ) or path in _MAY_NOT)
        ]
        if changed:
            accepted = "the values that the run began with"
            raise ConfigError(message("run", "--resume", listing(changed), accepted, "or start another --output"))

    def _writers(self, done: int) -> list[Writer]:
        if self.grid.rank != 0:
            return []
        return open_writers(
            self.output, self.config.report, self.config.to_json(), steps=self.config.steps, resumed_at=done
        )

    # --- a step -----------------------------------------------------------------------------------------------------

    def _one_step(self, step: int, writers: list[Writer]) -> bool:
        """Trains, reports, and tells whether a rank was asked to stop."""
        parts, start = self.parts, time.perf_counter()
        batch = parts.reader.next_step(self.config.steps - step)
        rate = parts.rates.learning_rate(step)
        read = time.perf_counter()
        profiled = step == self.config.report.profile_step
        with profile(self.output, self.grid.rank, step) if profiled else nullcontext():
            outcome = parts.step.run(batch.microbatches, learning_rate=rate, media=batch.media)
        stepped = time.perf_counter()
        self._patches += outcome.patches_encoded
        clipped, stopping, load = self._agree(outcome)
        metrics = {
            "step": step,
            "loss": outcome.loss,
            "tokens": batch.num_tokens,
            "loss_tokens": batch.loss_tokens,
            "tokens_by_source": batch.tokens_by_source,
            "patches": batch.patches,
            **_balance(outcome),
            "learning_rate": rate,
            "gradient_norm": outcome.gradient_norm,
            "finite": outcome.finite,
            "heads_clipped": clipped,
            "expert_load_max_over_mean": load,
            **self._speed(batch, stepped - start),
            "seconds": {"data": read - start, "step": stepped - read},
        }
        if self.config.validation.every is not None and step % self.config.validation.every == 0:
            metrics["validation"] = self.validate()
        for writer in writers:
            writer.write(metrics)
        self._skipped = 0 if outcome.finite else self._skipped + 1
        if self._skipped >= _MOST_SKIPPED:
            raise DivergenceError(
                f"run: step {step}: gradients that are not finite for {_MOST_SKIPPED} steps in a row; parameters are "
                f"those after step {step - _MOST_SKIPPED}; lower optimizer.learning_rate, or look at the data"
            )
        return stopping

    def validate(self) -> dict[str, float]:
        """The mean loss of each kind of held-out documents. Collective over the grid. Not after `run`."""
        losses: dict[str, float] = {}
        for name, batches in self.parts.validation.items():
            total, loss_tokens = 0.0, 0
            for sequences in batches:
                batch = self.parts.batches.make(sequences)
                total += self.parts.step.evaluate(batch.microbatches, media=batch.media) * batch.loss_tokens
                loss_tokens += batch.loss_tokens
            losses[name] = total / max(1, loss_tokens)
        return losses

    def _agree(self, outcome: StepOutcome) -> tuple[int, bool, float]:
        """Heads clipped in the whole model, whether any rank was asked to stop, the worst router's load."""
        sizes = self.grid.sizes
        load = outcome.expert_load.get("max_violation", 0.0) + 1
        copies = sizes.data * sizes.context
        sums = torch.tensor([outcome.heads_clipped / copies, float(self._stop_asked)], dtype=torch.float64)
        most = torch.tensor([load], dtype=torch.float64)
        group = self.grid.group("world")
        if group is not None:
            sums, most = sums.to(self.grid.device_type), most.to(self.grid.device_type)
            dist.all_reduce(sums, group=group)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return round(float(sums[0])), bool(sums[1] > 0), float(most)

    def _speed(self, batch: StepBatch, seconds: float) -> dict[str, float | None]:
        text, vision = self.parts.model_config.text, self.parts.model_config.vision
        flops = 3 * text_work(text, self.config.batch.sequence_length).flops * batch.num_tokens
        if vision is not None and batch.patches:
            flops += 3 * vision_work(vision, text.hidden_size, (1, 1, 1)).gemm * batch.patches
        peak = _peak_flops(self.grid)
        return {
            "tokens_per_second": batch.num_tokens / seconds,
            "flops_per_second": flops / seconds,
            "mfu": None if peak is None else flops / seconds / peak,
        }

    # --- state ------------------------------------------------------------------------------------------------------

    def _save(self, step: int, *, is_last: bool) -> None:
        """Collective. A save that failed, this one or the one before, failed on all ranks."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self._say(f"{error}; the next one is tried now")
        try:
            self._begin_saving(step)
        except CheckpointError as error:
            if is_last:
                raise
            self._say(f"{error}; training goes on, the next one is due at step {step + self.checkpoints.every}")

    def _say(self, line: str) -> None:
        if self.grid.rank == 0:
            print(line, file=sys.stderr, flush=True)

    def _begin_saving(self, step: int) -> None:
        states: list[dict[str, Any]] = [self.parts.reader.state()]
        group = self.grid.group("data")
        if group is not None:
            states *= self.grid.size("data")
            dist.all_gather_object(states, self.parts.reader.state(), group=group)
        extra = {"data": {k: v for state in states for k, v in state.items()}, "config": self.config.to_json()}
        self.checkpoints.save(step, self.parts.model, self.parts.optimizer, extra)

    def _write_ranks(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.parts.model.parameters.values())
        mine = {"rank": self.grid.rank, "parameters": parameters, "vision_patches": self._patches}
        everyone = [mine]
        group = self.grid.group("world")
        if group is not None:
            everyone *= self.grid.size("world")
            dist.all_gather_object(everyone, mine, group=group)
        self._write_json("ranks.json", everyone)

    def _write_json(self, name: str, contents: Mapping[str, Any] | list[dict[str, Any]]) -> None:
        if self.grid.rank == 0:
            temporary = self.output / f".{name}.new"
            temporary.write_text(json.dumps(contents, indent=1) + "\n")
            os.replace(temporary, self.output / name)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:  # a second one ends at once
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop_asked = True


def _balance(outcome: StepOutcome) -> dict[str, float]:
    """Of a decoupled encoder: its fullest rank's load over the mean, and the least that any plan could have."""
    plan = outcome.encoding
    if plan is None:
        return {}
    return {"encoder_max_over_mean": plan.max_over_mean, "encoder_over_lower_bound": plan.over_lower_bound}


def _resolved(config: RunConfig, grid: RankGrid) -> RunConfig:
    """What the grid and the batch leave open, said."""
    data = grid.size("data")
    microbatches = config.pipeline.microbatches or max(1, config.batch.sequences // data)
    return replace(
        config, grid=replace(config.grid, data=data), pipeline=replace(config.pipeline, microbatches=microbatches)
    )  # fmt: skip


def _peak_flops(grid: RankGrid) -> float | None:
    """Of all ranks; None for a device whose peak no data sheet gave us."""
    if grid.device_type != "cuda":
        return None
    name = torch.cuda.get_device_name().lower()
    known = next((each for each in ("h800", "h100", "h200") if each in name), None)
    return None if known is None else hardware(known).peak_flops * grid.size("world")
