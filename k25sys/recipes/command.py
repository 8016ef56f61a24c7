"""`python -m k25sys run`: a recipe, overridden by flags, on one process or under torchrun."""

# pyright: reportPrivateImportUsage=false

import argparse
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.distributed as dist

from k25sys.data import ByteTokenizer, Mixture, TiktokenTokenizer, Tokenizer, check_special_tokens
from k25sys.errors import ConfigError
from k25sys.models import KimiK25, KimiK25Config
from k25sys.parallel import RankGrid
from k25sys.parallel.agreement import agreed
from k25sys.parallel.faults import Monitor
from k25sys.planner.plan import make_plan
from k25sys.planner.report import table
from k25sys.planner.request import PlanRequest
from k25sys.recipes import find_recipe, fusion_ablation, recipes
from k25sys.recipes.recipe import Recipe
from k25sys.training.config import RunConfig, override
from k25sys.training.loop import Trainer

_TIMEOUT = timedelta(minutes=10)
_PATIENCE = timedelta(hours=6)
"""For data that rank 0 generates."""
_TRAINING_BYTES, _FROZEN_BYTES = 16, 4
"""Of a parameter: weight, gradient, master, moments; or its weight alone."""


def list_recipes() -> str:
    """A line each."""
    summaries = {name: recipe.summary for name, recipe in recipes().items()}
    summaries[fusion_ablation.NAME] = fusion_ablation.SUMMARY
    width = max(map(len, summaries))
    return "\n".join(f"{name:{width}}  {summary}" for name, summary in summaries.items())


def run(arguments: argparse.Namespace) -> str:
    """Trains, and says where the run is. A model that this machine cannot hold is planned and printed.

    Raises:
        ConfigError, GridError, ... : one line that says what to change.
    """
    arguments.output = arguments.output or f"runs/{arguments.recipe}-{arguments.preset}"
    if arguments.recipe == fusion_ablation.NAME:
        return fusion_ablation.run(arguments)
    recipe = find_recipe(arguments.recipe)
    config = recipe.config(arguments.preset)
    if arguments.steps is not None:
        config = replace(config, steps=arguments.steps)
    config = override(config, arguments.set)
    model_config = recipe.model(config)
    needs, has = _bytes_needed(config, model_config), _bytes_here()
    if needs > has:
        planned = _planned(recipe, config, needs, has)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return planned
        raise ConfigError(planned.rpartition("\n")[2])
    tokenizer = _tokenizer(config, model_config)
    with _ranks(config) as (grid, monitor):
        mixture = _in_turn(grid, lambda: recipe.mixture(config, tokenizer, Path(arguments.output) / "data"))
        validation = None
        if recipe.validation is not None and config.validation.every is not None:
            validation = recipe.validation(config, tokenizer)
        trainer = Trainer(
            config, model_config, mixture, grid, arguments.output, validation=validation, monitor=monitor
        )  # fmt: skip
        step = trainer.run(resume=arguments.resume)
        done = "done" if step == config.steps else "stopped when asked to; --resume goes on"
        return f"{arguments.output}: step {step} of {config.steps}, {done}" if grid.rank == 0 else ""


def _in_turn(grid: RankGrid, make: Callable[[], Mixture]) -> Mixture:
    """Rank 0 first: what it generates, the others find."""
    group = grid.group("world")
    if group is None:
        return make()
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE, group_desc="data that rank 0 makes")
    assert isinstance(waiting, dist.ProcessGroup)
    made = None
    with agreed(waiting):
        if grid.rank == 0:
            made = make()
    return make() if made is None else made


@contextmanager
def _ranks(config: RunConfig) -> Iterator[tuple[RankGrid, Monitor | None]]:
    """The grid of the processes that were started: by torchrun, or this one alone."""
    device_type, world_size = "cuda" if torch.cuda.is_available() else "cpu", int(os.environ.get("WORLD_SIZE", "1"))
    sizes = config.grid.sizes(world_size)
    if world_size == 1:
        yield RankGrid.create(sizes, device_type=device_type), None
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Of torch 2.13, which renames collectives that earlier versions have under the old names alone.
    warnings.filterwarnings("ignore", message=r".*_tensor` is deprecated", category=FutureWarning)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        with _monitor(dist.get_rank(), world_size) as monitor:
            yield RankGrid.create(sizes, device_type=device_type, timeout=_TIMEOUT), monitor
    finally:
        dist.destroy_process_group()


def _monitor(rank: int, world_size: int) -> Monitor:
    """Over the launcher's store, which outlives every rank."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Monitor(dist.PrefixStore(f"k25sys/monitor/{attempt}", store), rank, world_size)


def _tokenizer(config: RunConfig, model_config: KimiK25Config) -> Tokenizer:
    tokenizer = ByteTokenizer() if config.data.tokenizer is None else TiktokenTokenizer(config.data.tokenizer)
    check_special_tokens(tokenizer, model_config.tokens.named(), model_config.text.vocab_size)
    return tokenizer


def _bytes_needed(config: RunConfig, model_config: KimiK25Config) -> float:
    """Weights, gradients and state of all ranks of this machine, roughly: what decides whether a run can begin."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in KimiK25(model_config).named_parameters()}
    frozen = sum(
        size for name, size in sizes.items() if any(fnmatchcase(name, each) for each in config.optimizer.frozen)
    )
    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (_TRAINING_BYTES * (sum(sizes.values()) - frozen) + _FROZEN_BYTES * frozen) * local / ranks


def _bytes_here() -> float:
    if torch.cuda.is_available():
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _planned(recipe: Recipe, config: RunConfig, needs: float, has: float) -> str:
    """The configuration, and what the planner expects of it."""
    grid = config.grid
    replicas = max(1, 512 // (grid.pipeline * grid.context * grid.tensor))
    data = grid.data or replicas
    request = PlanRequest(
        preset=config.preset, gpus=grid.pipeline * grid.context * grid.tensor * data, pp=grid.pipeline,
        vpp=config.pipeline.virtual_stages, ep=grid.expert, tp=grid.tensor, cp=grid.context,
        microbatches=config.pipeline.microbatches or max(1, config.batch.sequences // data),
        schedule=config.pipeline.schedule, sequence=config.batch.sequence_length, vision=config.vision.mode,
        vision_share=recipe.media_share if config.data.vision_budget is None else config.data.vision_budget,
    )  # fmt: skip
    return (
        f"{json.dumps(config.to_json(), indent=1)}\n{table(make_plan(request))}\n"
        f"not run: {config.preset} needs {needs / 1e9:,.0f} GB for weights, gradients and state, this machine has "
        f"{has / 1e9:,.0f}"
    )
