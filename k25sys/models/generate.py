"""Token-in, token-out sampling with the compressed cache of MLA.

Shape suffixes: A sequences still running, V vocabulary.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message
from k25sys.models.documents import Documents
from k25sys.models.kimi_k25 import KimiK25
from k25sys.models.latent_cache import LatentCache

_OP = "generate"


class Sample(NamedTuple):
    """What was generated after a prompt."""

    token_ids: list[int]
    """The new tokens; the last is a stop id unless `max_new_tokens` ended it."""
    logprobs: list[float]
    """The model's log-probability of each, at temperature 1 and over the whole vocabulary."""


@torch.no_grad()
def generate(
    model: KimiK25,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Collection[int] | None = None,
    generator: torch.Generator | None = None,
    pixel_values: Tensor | None = None,
    grid_thw: Tensor | None = None,
    num_samples: int = 1,
) -> list[Sample]:
    """Samples continuations of all prompts together; their lengths may differ.

    The prompts are computed once, packed without padding, however many samples follow each: the samples of a prompt
    share its cache. A sample that has ended is dropped, and with its last sample a prompt. In the attention of new
    tokens to prompts, shorter prompts and prompts with fewer samples are padded to the most that still run.
    media_pad is never sampled from a model with vision.

    Args:
        model: gradients are not recorded; training continues from it unchanged.
        prompts: token ids of each, at least one.
        max_new_tokens: the most that are added to a prompt.
        temperature: logits are divided by it before sampling; 0 takes the likeliest token (the lowest id of a tie).
        top_p: samples from the smallest set of likeliest tokens whose probabilities, after temperature, reach it.
        stop_ids: a sample ends after any of these; None: those of the model's config.
        generator: of the random choices, on the device of the model; the global one where None.
        pixel_values, grid_thw: the media of all prompts, concatenated in the order of the prompts.
        num_samples: K, how many continuations of each prompt.

    Returns:
        len(prompts) * K samples; sample i * K + j continues prompt i. Log-probabilities are those of the policy itself,
        of which temperature and top_p do not change anything: what a reinforcement-learning objective compares with
        a teacher-forced forward, and equal to it up to rounding.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, an empty prompt, a token (of a prompt or of
            stop_ids) outside the vocabulary, more tokens than positions, or media that do not fit the media_pad
            positions.
    """
    _check_sampling(max_new_tokens, temperature, top_p, num_samples)
    stops = frozenset(_token_ids(model, "stop_ids", model.config.tokens.stop if stop_ids is None else stop_ids))
    ids = _check_prompts(model, prompts, max_new_tokens)
    if not ids:
        return []
    device = model.language_model.lm_head.weight.device
    cache, logits_AV = _read_prompts(model, ids, pixel_values, grid_thw, num_samples, device)
    samples = [Sample([], []) for _ in range(len(ids) * num_samples)]
    for step in range(1, max_new_tokens + 1):
        logits_AV = logits_AV.to(torch.promote_types(logits_AV.dtype, torch.float32))
        tokens_A = _choose(_without_media(model, logits_AV), temperature, top_p, generator)
        logprobs_A = logits_AV.log_softmax(-1).gather(1, tokens_A[:, None])[:, 0]
        tokens = tokens_A.tolist()
        for row, token, logprob in zip(cache.rows_A.tolist(), tokens, logprobs_A.tolist(), strict=True):
            samples[row].token_ids.append(token)
            samples[row].logprobs.append(logprob)
        running_A = torch.tensor([token not in stops for token in tokens], device=device)
        if step == max_new_tokens or not running_A.any():
            break
        cache.keep(running_A)
        hidden_AD = model.language_model.model.decode(tokens_A[running_A], cache)
        logits_AV = model.language_model.lm_head(hidden_AD)
    return samples


def _read_prompts(
    model: KimiK25,
    prompts: list[list[int]],
    pixel_values: Tensor | None,
    grid_thw: Tensor | None,
    num_samples: int,
    device: torch.device,
) -> tuple[LatentCache, Tensor]:
    """The cache after all prompts and the logits of each sample's first token."""
    text = model.config.text
    packed_1T = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
    documents = Documents(tuple(map(len, prompts)), device)
    cache = LatentCache(
        num_layers=text.num_hidden_layers,
        latent_dim=text.kv_lora_rank,
        prompts=documents,
        samples_per_prompt=num_samples,
    )
    hidden_1TD = model.hidden_states(
        packed_1T, pixel_values, grid_thw, cu_seqlens=documents.cu_seqlens, cache=cache
    )  # fmt: skip
    last_PD = hidden_1TD[0, documents.ends_N - 1]
    return cache, model.language_model.lm_head(last_PD).repeat_interleave(num_samples, 0)


def _without_media(model: KimiK25, logits_AV: Tensor) -> Tensor:
    """-inf for media_pad: it stands for pixels, and a forward over the sample would ask for them."""
    media_pad = model.config.tokens.media_pad
    if model.config.vision is None or media_pad is None:
        return logits_AV
    return logits_AV.index_fill(1, torch.tensor([media_pad], device=logits_AV.device), float("-inf"))


def _choose(logits_AV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """(A,) int64: a token of each row."""
    if temperature == 0:
        return logits_AV.argmax(-1)
    # The largest logit is taken off first, and the divisor kept above float32's zero: small temperatures stay finite.
    divisor = max(temperature, torch.finfo(torch.float32).tiny)
    probabilities_AV = ((logits_AV - logits_AV.amax(-1, keepdim=True)) / divisor).softmax(-1)
    if top_p < 1:
        falling_AV, order_AV = probabilities_AV.sort(dim=-1, descending=True, stable=True)
        before_AV = falling_AV.cumsum(-1) - falling_AV
        falling_AV = falling_AV.masked_fill(before_AV >= top_p, 0.0)
        probabilities_AV = torch.zeros_like(probabilities_AV).scatter(1, order_AV, falling_AV)
    return torch.multinomial(probabilities_AV, 1, generator=generator)[:, 0]


def _check_prompts(model: KimiK25, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    most = model.config.text.max_position_embeddings
    if not isinstance(prompts, Iterable):
        raise ArgumentTypeError(message(_OP, "prompts", repr(prompts), "a sequence of prompts"))
    ids = [_token_ids(model, f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ArgumentValueError(message(_OP, f"prompts[{i}]", "no tokens", "at least one token"))
        if len(prompt) + max_new_tokens > most:
            got = f"{len(prompt)} tokens and {max_new_tokens} new ones"
            raise ArgumentValueError(message(_OP, f"prompts[{i}]", got, f"up to max_position_embeddings {most}"))
    return ids


def _token_ids(model: KimiK25, argument: str, ids: Any) -> list[int]:
    """`ids` as ints; any integers will do, numpy's too."""
    values = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(values, Iterable):
        raise ArgumentTypeError(message(_OP, argument, repr(values), "token ids: a list, or a 1-D tensor"))
    vocabulary, tokens = model.config.text.vocab_size, []
    for token in values:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ArgumentTypeError(message(_OP, argument, repr(token), "token ids, as ints"))
        tokens.append(int(token))
        if not 0 <= tokens[-1] < vocabulary:
            raise ArgumentValueError(message(_OP, argument, f"token {token}", f"0 to {vocabulary - 1}"))
    return tokens


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float, num_samples: int) -> None:
    for name, count in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise ArgumentTypeError(message(_OP, name, repr(count), "an int"))
        if count < 1:
            raise ArgumentValueError(message(_OP, name, count, "an int >= 1"))
    for name, number in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(number, bool) or not isinstance(number, Real):
            raise ArgumentTypeError(message(_OP, name, repr(number), "a number"))
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ArgumentValueError(message(_OP, "temperature", temperature, "a finite number >= 0"))
    if not 0 < top_p <= 1:
        raise ArgumentValueError(message(_OP, "top_p", top_p, "a number in (0, 1]"))
