"""What a recipe is, and the sizes that all of them share for each preset."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from k25sys.data import Mixture, Tokenizer
from k25sys.errors import ConfigError, message
from k25sys.models import KimiK25Config
from k25sys.models.presets import preset
from k25sys.training.config import (
    BatchOptions,
    CheckpointOptions,
    GridOptions,
    OptimizerOptions,
    PipelineOptions,
    RunConfig,
    VisionOptions,
)


def model_of_preset(config: RunConfig) -> KimiK25Config:
    """The preset as it is."""
    return preset(config.preset)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A phase: its defaults, its data, its model."""

    name: str
    summary: str
    config: Callable[[str], RunConfig]
    """The defaults for a preset."""
    mixture: Callable[[RunConfig, Tokenizer, Path], Mixture]
    """Of a run; the folder is for data that it generates. Rank 0 is the first to call it, alone."""
    validation: Callable[[RunConfig, Tokenizer], Mapping[str, Mixture]] | None = None
    """Documents that are held out, by kind."""
    model: Callable[[RunConfig], KimiK25Config] = model_of_preset
    media_share: float = 0.0
    """Of tokens, where data.vision_budget does not say: what a plan of it assumes."""


def base_config(recipe: str, preset_name: str) -> RunConfig:
    """A global batch, a grid and rates for the preset. Those of k25 are K2's (section 2.5 of its report), on 512 GPUs.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset_name in ("tiny", "small"):
        rate = 2e-3 if preset_name == "tiny" else 5e-4
        return RunConfig(
            recipe=recipe, preset=preset_name, batch=BatchOptions(sequences=8, sequence_length=512),
            vision=VisionOptions(max_patches=256),
            optimizer=OptimizerOptions(learning_rate=rate, final_learning_rate=rate / 10, balance_rate=0.02),
        )  # fmt: skip
    if preset_name not in ("moonlight", "k25"):
        raise ConfigError(message("run", "--preset", repr(preset_name), "tiny, small, moonlight, k25"))
    large = RunConfig(
        recipe=recipe, preset=preset_name, precision="bf16", steps=231_500,
        batch=BatchOptions(sequences=16_384, sequence_length=4096),  # 67M tokens
        vision=VisionOptions(mode="dep", max_patches=16_384),
        optimizer=OptimizerOptions(
            learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=500, stable_steps=149_000, decay_steps=82_000
        ),
        checkpoint=CheckpointOptions(every=500, keep=5),
    )  # fmt: skip
    if preset_name == "moonlight":
        return replace(large, grid=GridOptions(expert=8))
    return replace(
        large,
        grid=GridOptions(pipeline=16, expert=16),
        pipeline=PipelineOptions(schedule="interleaved_1f1b", virtual_stages=2),
    )
