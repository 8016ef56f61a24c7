"""A recipe's steps: how long they take, and what of that is not the model's and the optimiser's.

python perf/bench_recipe.py [--recipe pretrain] [--preset tiny small] [--steps N] [--json FILE]

Inside is TrainStep.run: forwards, backwards, optimiser, communication. Outside are reading and packing of data,
decoding of pictures, metrics, checkpoints (one in the middle of the run, asynchronous), the loop itself.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from k25sys.data import ByteTokenizer
from k25sys.parallel import GridSizes, RankGrid
from k25sys.recipes import find_recipe
from k25sys.training.config import CheckpointOptions, ReportOptions
from k25sys.training.loop import Trainer
from perf import harness

WARM = 3


def bench(recipe_name: str, preset_name: str, steps: int) -> dict[str, Any]:
    """One preset."""
    recipe = find_recipe(recipe_name)
    config = replace(
        recipe.config(preset_name), steps=WARM + steps, checkpoint=CheckpointOptions(every=WARM + steps // 2),
        report=ReportOptions(progress=False),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        mixture = recipe.mixture(config, ByteTokenizer(), Path(folder) / "data")
        trainer = Trainer(config, recipe.model(config), mixture, RankGrid.create(GridSizes()), Path(folder) / "run")
        run, begins, ends = trainer.parts.step.run, [], []

        def timed(*args: Any, **options: Any) -> Any:
            begins.append(time.perf_counter())
            outcome = run(*args, **options)
            ends.append(time.perf_counter())
            return outcome

        trainer.parts.step.run = timed
        trainer.run()
    inside = [end - begin for begin, end in zip(begins, ends, strict=True)][WARM:]
    whole = ends[-1] - ends[WARM - 1]
    tokens = config.batch.sequences * config.batch.sequence_length
    return {
        "name": f"{recipe_name}/{preset_name}/threads={torch.get_num_threads()}",
        "allocator": harness.allocator(),
        "ours_s": whole / steps,
        "inside_s": median(inside),
        "outside_share": 1 - sum(inside) / whole,
        "tokens_per_second": tokens * steps / whole,
        "peers_s": {},
        "ratio": None,
        "peak_bytes": None,
        "peers_peak_bytes": {},
    }


def main() -> None:
    """Runs the presets, prints each, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pretrain")
    parser.add_argument("--preset", nargs="+", default=["tiny", "small"], choices=("tiny", "small"))
    parser.add_argument("--steps", type=int, default=20, help="that count, after three to warm up")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps: got {arguments.steps}, accepted at least 2")
    print(harness.machine(), flush=True)
    cases = []
    for preset_name in arguments.preset:
        case = bench(arguments.recipe, preset_name, arguments.steps)
        cases.append(case)
        print(
            f"{case['name']}: {case['ours_s']:.3f} s a step, {case['tokens_per_second']:,.0f} tokens/s; "
            f"{case['outside_share']:.1%} outside of model and optimiser",
            flush=True,
        )
    if arguments.json:
        harness.write_json(arguments.json, "recipe", {"expert_mlp": "native"}, cases)


if __name__ == "__main__":
    main()
