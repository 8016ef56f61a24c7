"""Long-context mid-training: 32k, then 262k positions, one after the other (K2.5 report, section 4.3; YaRN from 4k).

The presets have YaRN's tables for all of it; what a stage changes is the length of a sequence. After the first stage:

    python -m k25sys run long_context --output B --set checkpoint.start_from=A/checkpoints/step-... \
        --set batch.sequence_length=262144 --set grid.context=8
"""

from dataclasses import replace

from k25sys.recipes import pretrain
from k25sys.recipes.corpus import held_out_of
from k25sys.recipes.recipe import Recipe, base_config
from k25sys.training.config import BatchOptions, GridOptions, RunConfig

LENGTHS = (32_768, 262_144)
"""Of K2.5's two stages."""


def config(preset_name: str) -> RunConfig:
    """The first stage; tiny and small do the shape of it, eight times their length for K2.5's 4k to 32k."""
    base = base_config("long_context", preset_name)
    joint = replace(base, data=pretrain.config(preset_name).data)
    rates = replace(base.optimizer, learning_rate=base.optimizer.final_learning_rate, warmup_steps=1)
    if preset_name in ("tiny", "small"):
        batch = BatchOptions(sequences=2, sequence_length=8 * base.batch.sequence_length)
        return replace(joint, steps=10, batch=batch, optimizer=rates)
    batch = BatchOptions(sequences=2048, sequence_length=LENGTHS[0])  # the same 67M tokens
    grid = GridOptions(pipeline=base.grid.pipeline, expert=base.grid.expert, context=2)
    rates = replace(rates, final_learning_rate=7e-6, stable_steps=0, decay_steps=7_500)  # K2's anneal
    return replace(joint, steps=7_500, batch=batch, grid=grid, optimizer=rates)


RECIPE = Recipe(
    name="long_context",
    summary="joint mid-training on long sequences, 32k and then 262k",
    config=config,
    mixture=pretrain.mixture,
    validation=held_out_of,
)
