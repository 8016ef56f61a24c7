"""ViT training: captions alone, by the cross-entropy of a frozen decoder; then the projector alone (K2.5, section 4.3).

First `vit` (the encoder learns to be read), then `vit-projector` from its checkpoint, against the decoder that joint
pre-training starts from: --set checkpoint.start_from=FOLDER/checkpoints/step-...
"""

from dataclasses import replace
from pathlib import Path

from k25sys.data import MixedSource, Mixture, Tokenizer
from k25sys.recipes.corpus import corpus_of
from k25sys.recipes.recipe import Recipe, base_config
from k25sys.training.config import DataOptions, RunConfig


def config(preset_name: str) -> RunConfig:
    """The tower and the projector."""
    base = base_config("vit", preset_name)
    frozen = replace(base.optimizer, frozen=("language_model.*",), max_logit=None)
    return replace(base, optimizer=frozen, data=DataOptions(vision_budget=None))


def projector_config(preset_name: str) -> RunConfig:
    """The projector."""
    base = config(preset_name)
    frozen = replace(base.optimizer, frozen=("language_model.*", "vision_tower.*"))
    return replace(base, recipe="vit-projector", steps=min(base.steps, 1000), optimizer=frozen)


def mixture(run: RunConfig, tokenizer: Tokenizer, folder: Path) -> Mixture:
    """Documents with media alone; text of theirs is what is learned from."""
    return Mixture([MixedSource(source, weight) for source, weight in corpus_of(run, tokenizer) if source.has_media])


RECIPE = Recipe(
    name="vit", summary="the encoder by captions, the decoder frozen", config=config, mixture=mixture
)  # fmt: skip
PROJECTOR = Recipe(
    name="vit-projector", summary="the projector alone, a short step", config=projector_config, mixture=mixture
)  # fmt: skip
