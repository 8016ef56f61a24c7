"""Zero-vision SFT: text alone, in which every operation on a picture is a program in an IPython tool (K2.5, 2.2).

Conversations are generated: problems about pictures, solved by programs that really ran in a sandbox. Or give your own:
--set data.files=chats.jsonl, one {"messages": [...], "tools": [...]} a line. Loss is on the assistant's tokens alone;
--set checkpoint.start_from=FOLDER/checkpoints/step-... takes the model that pre-training left.
A conversation longer than a sequence goes on in a later one: choose batch.sequence_length by your own files.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from k25sys.data import MixedSource, Mixture, Tokenizer
from k25sys.data.trajectories import ConversationSource, generated_conversations
from k25sys.recipes.recipe import Recipe, base_config
from k25sys.training.config import BatchOptions, DataOptions, RunConfig

_COUNT = {"tiny": 200, "small": 1000}
"""Generated conversations; the larger presets take ten thousand."""


def config(preset_name: str) -> RunConfig:
    """Sequences that hold a conversation, a tenth of pre-training's rate; the encoder sees nothing and stays."""
    base = base_config("sft", preset_name)
    rates = replace(
        base.optimizer, learning_rate=base.optimizer.learning_rate / 10,
        final_learning_rate=base.optimizer.final_learning_rate / 10, frozen=("vision_tower.*", "mm_projector.*"),
    )  # fmt: skip
    steps = base.steps
    if preset_name in _COUNT:
        batch = BatchOptions(sequences=2, sequence_length=4096)  # of bytes: the longest takes nearly all of one
    else:
        batch, steps = BatchOptions(sequences=512, sequence_length=8192), 100  # a few epochs of what is generated
        rates = replace(rates, warmup_steps=10, stable_steps=0, decay_steps=steps - 10)
    return replace(base, steps=steps, batch=batch, optimizer=rates, data=DataOptions(vision_budget=None))


def mixture(run: RunConfig, tokenizer: Tokenizer, folder: Path) -> Mixture:
    """Conversations alone."""
    if run.data.files:
        return Mixture([MixedSource(ConversationSource(file, tokenizer), 1.0) for file in run.data.files])
    count = _COUNT.get(run.preset, 10_000)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"conversations-{count}-{run.seed}.jsonl"
    if not file.exists():
        print(f"run: {count} conversations are generated, about four a second for each processor", file=sys.stderr)
    source = generated_conversations(count, run.seed, tokenizer, file, jobs=os.cpu_count() or 1)
    return Mixture([MixedSource(source, 1.0)])


RECIPE = Recipe(
    name="sft", summary="zero-vision SFT on generated tool-use conversations", config=config, mixture=mixture
)  # fmt: skip
