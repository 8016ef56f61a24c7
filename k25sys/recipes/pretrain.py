"""Joint pre-training: text and vision from the first token on, at a constant ratio (K2.5 report, sections 2.1 and 4.3).

The winning ratio of the report's ablation is 10% vision, from the start: --set data.vision_budget, data.inject.
From other runs, as one of text, and one of the encoder with its projector:

    --set checkpoint.start_from=TEXT,VIT:vision_tower.*,VIT:mm_projector.*

Parts of the model that none of them has begin from the seed, which is said.
"""

from dataclasses import replace
from pathlib import Path

from k25sys.data import MixedSource, Mixture, Tokenizer
from k25sys.recipes.corpus import corpus_of, held_out_of
from k25sys.recipes.recipe import Recipe, base_config
from k25sys.training.config import DataOptions, RunConfig


def config(preset_name: str) -> RunConfig:
    """ViT, projector and language model, all trained."""
    base = base_config("pretrain", preset_name)
    share = 0.3 if preset_name in ("tiny", "small") else 0.1  # small batches: pictures in every step
    return replace(base, data=DataOptions(vision_budget=share))


def mixture(run: RunConfig, tokenizer: Tokenizer, folder: Path) -> Mixture:
    """All sources of the corpus: within text and within vision each in the share that the corpus gives it."""
    sources = [MixedSource(source, weight) for source, weight in corpus_of(run, tokenizer)]
    return Mixture(sources, vision_budget=run.data.vision_budget, inject=run.data.inject)


RECIPE = Recipe(
    name="pretrain",
    summary="joint text and vision pre-training, early fusion, from scratch or from a checkpoint",
    config=config,
    mixture=mixture,
    validation=held_out_of,
)
