"""A model for the lm-evaluation-harness (extra `lm-eval`): `lm_eval.simple_evaluate(model=lm_eval_model(...))`.

Text alone, without the chat format: the harness's own prompts as they are. What it needs is defined by
lm_eval.api.model.LM.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from k25sys.data import Tokenizer
from k25sys.errors import ArgumentTypeError, ArgumentValueError, OptionalPackageError, message
from k25sys.models import KimiK25, generate

_ACCEPTED_OPTIONS = ("until", "max_gen_toks", "temperature", "top_p", "do_sample")


def lm_eval_model(
    model: KimiK25,
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    max_sequences: int = 16,
    max_packed_tokens: int = 16_384,
    seed: int = 0,
) -> Any:
    """An lm_eval.api.model.LM over `model`.

    Args:
        model: on its device; not changed.
        tokenizer: the model's.
        max_length: tokens that the model sees at once; all its positions by default.
        max_gen_toks: of a reply to which the harness sets no limit.
        max_sequences: replies that are sampled at once.
        max_packed_tokens: tokens of one forward, in which texts are packed without padding.
        seed: of replies that are sampled.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: a size below 1, or a max_length above the model's positions.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        hint = "pip install 'k25sys[lm-eval]'"
        raise OptionalPackageError(
            message("lm_eval_model", "package", "no lm_eval", "lm-eval >= 0.4.9", hint)
        ) from error
    likelihoods = Likelihoods(model, tokenizer, max_length=max_length, max_packed_tokens=max_packed_tokens)
    replies = Replies(model, tokenizer, likelihoods.max_length, max_gen_toks, max_sequences, seed)

    class KimiK25LM(LM):
        """The three kinds of requests of the harness."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = likelihoods.of_continuations([request.args for request in requests])
            for request, each in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, each)
            return found

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            found = likelihoods.of_texts([request.args[0] for request in requests])
            for request, each in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, each)
            return found

        def generate_until(self, requests: list[Any]) -> list[str]:
            found = replies.until([request.args for request in requests])
            for request, each in zip(requests, found, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, each)
            return found

    return KimiK25LM()


class Likelihoods:
    """Log-probabilities of texts, packed into forwards. An end-of-text token stands before each text."""

    def __init__(
        self, model: KimiK25, tokenizer: Tokenizer, *, max_length: int | None = None, max_packed_tokens: int = 16_384
    ) -> None:
        most = model.config.text.max_position_embeddings
        self.max_length = most if max_length is None else max_length
        if not 1 <= self.max_length <= most:
            raise ArgumentValueError(message("lm_eval_model", "max_length", max_length, f"1 to {most}"))
        if max_packed_tokens < 1:
            raise ArgumentValueError(message("lm_eval_model", "max_packed_tokens", max_packed_tokens, "an int >= 1"))
        self.model, self.tokenizer, self.max_packed_tokens = model, tokenizer, max_packed_tokens

    def of_continuations(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of (context, continuation): the continuation's log-probability, and whether each of its tokens is likeliest.

        Context and continuation are encoded as one text; white space at the end of a context counts as the
        continuation's. A context that is too long loses its beginning.

        Raises:
            ValueError: a continuation that is empty, or longer than max_length.
        """
        windows = []
        for context, continuation in pairs:
            start, wanted = self._encode(context, continuation)
            if not 1 <= len(wanted) <= self.max_length:
                got = f"{len(wanted)} tokens, {continuation[:40]!r}"
                raise ArgumentValueError(
                    message("loglikelihood", "continuation", got, f"1 to {self.max_length} tokens")
                )
            ids = (start + wanted)[-self.max_length - 1 :]
            windows.append((ids, len(wanted)))
        return self._scored(windows)

    def of_texts(self, texts: Sequence[str]) -> list[float]:
        """Of whole texts. Each token counts once; the last window of a long text reaches back as far as it can."""
        windows, owners = [], []
        for i, text in enumerate(texts):
            ids = [self.tokenizer.special.eos, *self.tokenizer.encode(text)]
            done = 1
            while done < len(ids):
                end = min(done + self.max_length, len(ids))
                windows.append((ids[max(0, end - self.max_length - 1) : end], end - done))
                owners.append(i)
                done = end
        sums = [0.0] * len(texts)
        for i, (logprob, _) in zip(owners, self._scored(windows), strict=True):
            sums[i] += logprob
        return sums

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        start, whole = self.tokenizer.encode(kept), self.tokenizer.encode(kept + continuation)
        # A token that merges across the boundary is the continuation's: it is not in the context alone.
        pairs = enumerate(zip(start, whole, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(start), len(whole)))
        return [self.tokenizer.special.eos, *whole[:shared]], whole[shared:]

    def _scored(self, windows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of windows (ids, n): the sum of the log-probabilities of the last n ids after those before them."""
        found: list[tuple[float, bool]] = []
        for some in self._packs(windows):
            found += self._forward(some)
        return found

    def _packs(self, windows: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
        pack, total = [], 0
        for window in windows:
            if pack and total + len(window[0]) - 1 > self.max_packed_tokens:
                yield pack
                pack, total = [], 0
            pack.append(window)
            total += len(window[0]) - 1
        if pack:
            yield pack

    @torch.no_grad()
    def _forward(self, windows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        head = self.model.language_model.lm_head
        device = head.weight.device
        inputs = [ids[:-1] for ids, _ in windows]
        ends = torch.tensor([0, *map(len, inputs)]).cumsum(0)
        packed_1T = torch.tensor([[token for ids in inputs for token in ids]], device=device)
        hidden_TD = self.model.hidden_states(packed_1T, cu_seqlens=ends.tolist())[0]
        found = []
        for (ids, count), end in zip(windows, ends[1:].tolist(), strict=True):
            logits_NV: Tensor = head(hidden_TD[end - count : end])
            logprobs_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
            wanted_N = torch.tensor(ids[-count:], device=device)
            logprob = logprobs_NV.gather(1, wanted_N[:, None]).sum(dtype=torch.float64)
            found.append((float(logprob), bool((logprobs_NV.argmax(-1) == wanted_N).all())))
        return found


class Replies:
    """Texts that are generated up to the first of some strings."""

    def __init__(
        self, model: KimiK25, tokenizer: Tokenizer, max_length: int, max_gen_toks: int, max_sequences: int, seed: int
    ) -> None:
        for name, value in (("max_gen_toks", max_gen_toks), ("max_sequences", max_sequences)):
            if value < 1:
                raise ArgumentValueError(message("lm_eval_model", name, value, "an int >= 1"))
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.max_gen_toks, self.max_sequences = max_gen_toks, max_sequences
        self.generator = torch.Generator(model.language_model.lm_head.weight.device).manual_seed(seed)

    def until(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Of (context, options): what is generated before the first string of options["until"], or the stop token.

        Greedy, unless options have do_sample (then temperature, 1 by default) or a temperature above 0. A context that
        is too long with the new tokens loses its beginning. The model does not see the strings: tokens behind them are
        generated, and dropped.

        Raises:
            TypeError, ValueError: an option of another type or range, or one that is not known.
        """
        settings = [self._settings(options) for _, options in requests]
        found = [""] * len(requests)
        for same in sorted(set(settings), key=settings.index):
            members = [i for i, each in enumerate(settings) if each == same]
            for start in range(0, len(members), self.max_sequences):
                some = members[start : start + self.max_sequences]
                for i, text in zip(some, self._generate([requests[i][0] for i in some], *same), strict=True):
                    found[i] = text
        return found

    def _settings(self, options: dict[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
        unknown = sorted(set(options) - set(_ACCEPTED_OPTIONS))
        if unknown:
            raise ArgumentValueError(message("generate_until", "options", unknown, ", ".join(_ACCEPTED_OPTIONS)))
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, (list, tuple)) or not all(isinstance(each, str) for each in until):
            raise ArgumentTypeError(message("generate_until", "until", repr(until), "a text or a list of texts"))
        most = options.get("max_gen_toks", self.max_gen_toks)
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most < self.max_length:
            raise ArgumentValueError(
                message("generate_until", "max_gen_toks", repr(most), f"1 to {self.max_length - 1}")
            )
        sampled = options.get("do_sample", options.get("temperature", 0.0) > 0)
        temperature = options.get("temperature", 1.0) if sampled else 0.0
        return tuple(each for each in until if each), most, float(temperature), float(options.get("top_p", 1.0))

    def _generate(
        self, contexts: list[str], until: tuple[str, ...], most: int, temperature: float, top_p: float
    ) -> list[str]:
        room, special = self.max_length - most, self.tokenizer.special
        prompts = [[special.eos, *self.tokenizer.encode(context)][-room:] for context in contexts]
        samples = generate(
            self.model, prompts, max_new_tokens=most, temperature=temperature, top_p=top_p, generator=self.generator
        )
        texts = []
        for sample in samples:
            ids = sample.token_ids
            ids = ids[:-1] if ids[-1] in self.model.config.tokens.stop else ids
            text = self.tokenizer.decode(token for token in ids if token < self.tokenizer.vocab_size)
            texts.append(text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))])
        return texts
