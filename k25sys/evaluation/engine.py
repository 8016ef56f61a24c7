"""Where replies come from: the protocol, and the engine that samples them from a model in this process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from k25sys.data import (
    ChatTokens,
    ImagePart,
    MediaLimits,
    Tokenizer,
    UserTurn,
    VideoPart,
    preprocess_image,
    preprocess_video,
    render_chat,
)
from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation.rows import Prompt
from k25sys.models import KimiK25, generate
from k25sys.models import Sample as Generated

_CELL = 14  # pixels a side of a patch
_EVERY_FRAME = 1e6  # frames a second: more than any video has, so that `frames` alone says which are taken


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are sampled."""

    num_samples: int
    max_tokens: int
    temperature: float
    top_p: float
    mode: Literal["thinking", "instant"]
    frames: int | None = None
    """Frames of a video, evenly spread; None: two a second."""
    frame_side: int = 896


class Reply(NamedTuple):
    """What a model answers."""

    text: str
    """Without its thinking; empty where the thinking did not end."""
    num_tokens: int
    """Thinking included."""
    is_complete: bool
    """Whether the model ended it, rather than the limit of tokens."""


class Engine(Protocol):
    """What `evaluate` asks of a model, here or behind a server."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Reply]]:
        """`sampling.num_samples` replies to each prompt, in order."""
        ...


class ModelEngine:
    """A model in this process: prompts in the released chat format, media through the released processing.

    Args:
        model: on the device it computes on; not changed.
        tokenizer: the model's.
        seed: of all samples. The same model, prompts, seed and `max_sequences` give the same replies.
        max_sequences: continuations that are sampled at once; bounds the memory.
    """

    def __init__(self, model: KimiK25, tokenizer: Tokenizer, *, seed: int = 0, max_sequences: int = 16) -> None:
        if max_sequences < 1:
            raise ArgumentValueError(message("ModelEngine", "max_sequences", max_sequences, "an int >= 1"))
        self.model, self.tokenizer, self.max_sequences = model, tokenizer, max_sequences
        self.device = model.language_model.lm_head.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Reply]]:
        """See `Engine.generate`. Media are decoded as their turn comes.

        Raises:
            ValueError, OSError: a prompt that is too long with max_tokens, or media that cannot be read.
            ImportError: a package to read them is not installed.
        """
        at_once = max(1, self.max_sequences // sampling.num_samples)
        replies: list[list[Reply]] = []
        for start in range(0, len(prompts), at_once):
            chats = [self._chat(prompt, sampling) for prompt in prompts[start : start + at_once]]
            found: list[list[Reply]] = [[] for _ in chats]
            for first in range(0, sampling.num_samples, self.max_sequences):
                count = min(self.max_sequences, sampling.num_samples - first)
                samples = self._sample(chats, count, sampling)
                for i, mine in enumerate(found):
                    mine += [self._reply(sample, sampling.mode) for sample in samples[i * count : (i + 1) * count]]
            replies += found
        return replies

    def _sample(self, chats: list[ChatTokens], count: int, sampling: Sampling) -> list[Generated]:
        pixels = [chat.pixel_values for chat in chats if chat.pixel_values is not None]
        grids = [chat.grid_thw for chat in chats if chat.grid_thw is not None]
        dtype = self.model.language_model.lm_head.weight.dtype
        return generate(
            self.model, [chat.token_ids for chat in chats], max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, generator=self.generator, num_samples=count,
            pixel_values=torch.cat(pixels).to(self.device, dtype) if pixels else None,
            grid_thw=torch.cat(grids).to(self.device) if grids else None,
        )  # fmt: skip

    def _chat(self, prompt: Prompt, sampling: Sampling) -> ChatTokens:
        content: list[str | ImagePart | VideoPart] = []
        for part in prompt:
            if isinstance(part, str):
                content.append(part)
            elif part.kind == "image":
                pixels, grid = preprocess_image(part.path)
                content.append(ImagePart(pixel_values=pixels, grid_thw=grid))
            else:
                pixels, grid, timestamps = preprocess_video(part.path, video_limits(sampling))
                content.append(VideoPart(pixel_values=pixels, grid_thw=grid, timestamps=timestamps))
        return render_chat([UserTurn(content=content)], self.tokenizer, prompt=sampling.mode)

    def _reply(self, sample: Generated, mode: str) -> Reply:
        ids, special = sample.token_ids, self.tokenizer.special
        is_complete = bool(ids) and ids[-1] in self.model.config.tokens.stop
        answer = ids[:-1] if is_complete else ids
        if mode == "thinking":
            end = (
                len(answer) - 1 - answer[::-1].index(special.end_think) if special.end_think in answer else len(answer)
            )
            answer = answer[end + 1 :]
        text = self.tokenizer.decode(token for token in answer if token < self.tokenizer.vocab_size)
        return Reply(text.strip(), len(ids), is_complete)


def video_limits(sampling: Sampling) -> MediaLimits:
    """The released limits, with the frames and sizes of an evaluation where it sets them."""
    if sampling.frames is None:
        return MediaLimits()
    side = max(1, sampling.frame_side // _CELL)
    return MediaLimits(fps=_EVERY_FRAME, max_frames=sampling.frames, side_patches=side, frame_patches=side * side)
