"""ViT training: captions alone, by the cross-entropy of a frozen decoder; then the projector alone (K2.5, section 4.3).

First `vit`: the encoder learns to be read by a small decoder, K2.5's by Moonlight (--preset moonlight --set
checkpoint.start_from=TEXT). Then
`vit-projector`: the encoder's weights, and the decoder that joint pre-training starts from:

    --set checkpoint.start_from=VIT:vision_tower.*,LLM:language_model.*
"""

from dataclasses import replace
from pathlib import Path

from k25sys.data import MixedSource, Mixture, Tokenizer
from k25sys.errors import ConfigError, listing, message
from k25sys.recipes.corpus import CORPUS_TEXTS, corpus_of
from k25sys.recipes.recipe import Recipe, base_config
from k25sys.training.config import DataOptions, RunConfig

_PROJECTOR_STEPS = 1000
_MEDIA_SHARE = 0.75


def config(preset_name: str) -> RunConfig:
    """The tower and the projector."""
    base = base_config("vit", preset_name)
    frozen = replace(base.optimizer, frozen=("language_model.*",), max_logit=None)
    steps = base.steps
    if preset_name in ("moonlight", "k25"):
        steps = 15_000  # 1T tokens
        frozen = replace(frozen, stable_steps=10_000, decay_steps=4_500)
    return replace(base, steps=steps, optimizer=frozen, data=DataOptions(vision_budget=None))


def projector_config(preset_name: str) -> RunConfig:
    """The projector."""
    base = config(preset_name)
    frozen = replace(base.optimizer, frozen=("language_model.*", "vision_tower.*"))
    if base.steps > _PROJECTOR_STEPS:
        frozen = replace(frozen, warmup_steps=100, stable_steps=0, decay_steps=_PROJECTOR_STEPS - 100)
    return replace(base, recipe="vit-projector", steps=min(base.steps, _PROJECTOR_STEPS), optimizer=frozen)


def mixture(run: RunConfig, tokenizer: Tokenizer, folder: Path) -> Mixture:
    """Documents with media alone; text of theirs is what is learned from."""
    found = corpus_of(run, tokenizer)
    text = [source.name for source, _ in found if not source.has_media and source.name not in CORPUS_TEXTS]
    if text:
        raise ConfigError(
            message("run", "data.files", f"text alone in {listing(text)}", "files with pictures or videos")
        )
    return Mixture([MixedSource(source, weight) for source, weight in found if source.has_media])


RECIPE = Recipe(
    name="vit", summary="the encoder by captions, the decoder frozen", config=config, mixture=mixture,
    media_share=_MEDIA_SHARE,
)  # fmt: skip
PROJECTOR = Recipe(
    name="vit-projector", summary="the projector alone, a short step", config=projector_config, mixture=mixture,
    media_share=_MEDIA_SHARE,
)  # fmt: skip
