"""Streams of packed sequences that can be resumed anywhere: sequence b of every step comes from stream b.

What a stream gives depends on its number and on how many streams there are, never on ranks or processes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from k25sys.data.mixture import GROUPS, Deficits, Group, MixedSource, Mixture, tokens_text
from k25sys.data.packing import PackedSequence, Packer, num_positions
from k25sys.data.permutation import Permutation
from k25sys.data.sample import Sample, fingerprint_of
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DataError, message


@dataclass
class _Held:
    """A document that was drawn and is not used up: the rest of a text, or one that waits for room or its turn."""

    mixed: MixedSource
    index: int
    epoch: int
    offset: int
    sample: Sample

    @property
    def remaining(self) -> int:
        """Positions that are left of it."""
        return num_positions(self.sample) - self.offset


@dataclass
class _Counters:
    """What a stream took from one source."""

    drawn: int = 0
    tokens: int = 0
    skipped: int = 0


@dataclass
class _Progress:
    """All that changes in a stream."""

    counters: dict[str, _Counters]
    deficits: Deficits
    sequences: int = 0
    held: dict[Group, _Held] = field(default_factory=dict)

    def copy(self) -> "_Progress":
        """Independent of this one, except for the documents themselves."""
        return _Progress(
            counters={name: copy.copy(counters) for name, counters in self.counters.items()},
            deficits=Deficits(self.deficits.vision, dict(self.deficits.sources)),
            sequences=self.sequences,
            held={group: copy.copy(held) for group, held in self.held.items()},
        )


class TokenStream:
    """One of the streams that a global batch consists of.

    The documents of a source follow one another in a new pseudo-random order every epoch, the epochs one after
    another; of all these places stream b of B owns those that are b mod B. So each document belongs to exactly one
    stream in each epoch, and small sources are spread over all streams in time.

    A text document is cut where a sequence ends and goes on in a later one. A document with media is never cut: where
    it does not fit, text fills the sequence, or padding where the mixture has no text. Where media documents are of
    nearly `sequence_length`, a large vision share cannot be reached.

    Skipped and counted are sound documents that cannot be used: with media of more than `sequence_length` positions,
    or of fewer than two tokens. Faulty ones are not skipped: a line that is no JSON or lacks its field, a file that is
    missing, a picture whose header cannot be read are found when the document is drawn, which may be late in a run,
    and end it there with an error that names source and document. A picture that is faulty behind its header ends it
    when its pixels are decoded.

    A state holds the fingerprints of the sources, so that a run is not resumed on files that are not those of before:
    mending a file means to begin anew, from the weights if not from the start.

    What vision is owed moves within the size of a document, as it must; where within, from below 0 to above, depends
    on b: so the errors of rounding to whole documents cancel over the streams, and vision documents of all streams do
    not come in the same step.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        number: int,
        num_streams: int,
        sequence_length: int,
        num_sequences: int,
        seed: int,
        pad: int,
        media_pad: int,
    ) -> None:
        """
        Args:
            mixture: the sources.
            number: b, of this stream.
            num_streams: B, the sequences of a global batch.
            sequence_length: T.
            num_sequences: of the whole run, all streams together: fixes the point of injection and the sources'
                starts. The stream may go on beyond them.
            seed: of the orders of documents.
            pad: the token that fills up.
            media_pad: the token in place of embeddings.

        Raises:
            TypeError, ValueError: an argument that is no integer or out of its range.
        """
        least = {"num_streams": (num_streams, 1), "sequence_length": (sequence_length, 1)}
        least |= {"num_sequences": (num_sequences, 1), "number": (number, 0), "pad": (pad, 0)}
        least |= {"media_pad": (media_pad, 0), "seed": (seed, 0)}
        for name, (value, bound) in least.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentTypeError(message("TokenStream", name, repr(value), "an integer"))
            if value < bound:
                raise ArgumentValueError(message("TokenStream", name, value, f">= {bound}"))
        if number >= num_streams:
            raise ArgumentValueError(
                message("TokenStream", "number", number, f"0 to num_streams - 1 = {num_streams - 1}")
            )
        if pad == media_pad:
            raise ArgumentValueError(message("TokenStream", "pad", pad, "another token than media_pad"))
        self.mixture = mixture
        self.number = number
        self.num_streams = num_streams
        self.sequence_length = sequence_length
        self.seed = seed
        self.pad = pad
        self.media_pad = media_pad
        run = num_sequences * sequence_length / num_streams
        self._inject_at = round(mixture.inject * run)
        self._start_at = {mixed.name: round(mixed.start * run) for mixed in mixture.sources}
        self._phase = (number + 0.5) / num_streams
        self._now = self._at_start()

    def next(self) -> PackedSequence:
        """The next sequence. After an error the stream is where it was before.

        Raises:
            ValueError: nothing is left, or a source failed or broke its contract; names it and the document.
        """
        before = self._now.copy()
        try:
            return self._pack()
        except BaseException:
            self._now = before
            raise

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON takes it. `sources` also says what was used and skipped so far."""
        now = self._now
        sources = {}
        for mixed in self.mixture.sources:
            counters = now.counters[mixed.name]
            epoch, position = divmod(self._place(counters), len(mixed.source))
            sources[mixed.name] = {
                "epoch": epoch,
                "position": position,
                "tokens": counters.tokens,
                "skipped": counters.skipped,
                "deficit": now.deficits.sources[mixed.name],
            }
        held = {
            group: {"source": it.mixed.name, "index": it.index, "epoch": it.epoch, "offset": it.offset}
            for group, it in sorted(now.held.items())
        }
        progress = {"sequences": now.sequences, "vision_deficit": now.deficits.vision}
        return {"stream": self._identity(), **progress, "sources": sources, "held": held}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on behind what the stream had given at `state`.

        Raises:
            ValueError: a state of another stream or mixture, or no state at all; a source whose files changed; the
                stream stays as it was.
        """
        wanted, got = self._identity(), state.get("stream") if isinstance(state, Mapping) else None
        if not isinstance(got, Mapping):
            raise _state_error(repr(state)[:80])
        for name, value in wanted.items():
            if name == "sources":
                _check_fingerprints(got.get(name), value)
            if got.get(name) != value:
                hint = "this state is of another run; start anew, or with the same data and settings"
                raise DataError(message("TokenStream.restore", name, got.get(name), value, hint))
        try:
            self._now = self._parsed(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise _state_error(f"{type(error).__name__}: {error}") from error

    def _at_start(self) -> _Progress:
        names = [mixed.name for mixed in self.mixture.sources]
        return _Progress({name: _Counters() for name in names}, Deficits(0.0, dict.fromkeys(names, 0.0)))

    def _identity(self) -> dict[str, Any]:
        """What a state belongs to. A run may be made longer where nothing depends on its length."""
        sources = [
            {
                "name": mixed.name,
                "documents": len(mixed.source),
                "fingerprint": fingerprint_of(mixed.source),
                "vision": mixed.source.has_media,
                "weight": mixed.weight,
                "max_epochs": mixed.max_epochs,
                "start": self._start_at[mixed.name],
            }
            for mixed in self.mixture.sources
        ]
        return {
            "number": self.number,
            "num_streams": self.num_streams,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "pad": self.pad,
            "media_pad": self.media_pad,
            "vision_budget": self.mixture.vision_budget,
            "inject": self._inject_at,
            "sources": sources,
        }

    def _parsed(self, state: Mapping[str, Any]) -> _Progress:
        now = self._at_start()
        now.sequences = _natural(state["sequences"])
        now.deficits.vision = _finite(state["vision_deficit"])
        for mixed in self.mixture.sources:
            entry, counters = state["sources"][mixed.name], now.counters[mixed.name]
            place = _natural(entry["epoch"]) * len(mixed.source) + _natural(entry["position"])
            counters.drawn, rest = divmod(place - self.number, self.num_streams)
            if rest != 0 or counters.drawn < 0:
                raise _state_error(f"place {place} of {mixed.name!r}", f"places of stream {self.number}")
            counters.tokens, counters.skipped = _natural(entry["tokens"]), _natural(entry["skipped"])
            now.deficits.sources[mixed.name] = _finite(entry["deficit"])
        by_name = {mixed.name: mixed for mixed in self.mixture.sources}
        for group in GROUPS:
            if group in state["held"]:
                entry = state["held"][group]
                mixed, index, epoch = by_name[entry["source"]], _natural(entry["index"]), _natural(entry["epoch"])
                if index >= len(mixed.source):
                    raise _state_error(f"document {index} of {mixed.name!r}", f"less than {len(mixed.source)}")
                held = _Held(mixed, index, epoch, _natural(entry["offset"]), self._sample(mixed, index, epoch))
                if mixed.group != group or held.remaining <= 0 or (held.sample.media and held.offset > 0):
                    raise _state_error(f"the rest of a {group} document {entry}", "a rest that can be")
                now.held[group] = held
        return now

    def _pack(self) -> PackedSequence:
        packer, now = Packer(self.sequence_length), self._now
        while packer.room:
            position = now.sequences * self.sequence_length + packer.used
            held = self._next_document(position, packer.room)
            if held is None:
                break
            active = self._active(position)
            tokens = packer.add(held.sample, held.mixed.name, held.offset)
            injected = min(tokens, max(0, position + tokens - self._inject_at))
            now.deficits.charge(held.mixed, tokens, active, self.mixture.vision_share(active) * injected)
            now.counters[held.mixed.name].tokens += tokens
            held.offset += tokens
            if held.remaining == 0:
                del now.held[held.mixed.group]
        if packer.used == 0:
            self._raise_empty()
        now.sequences += 1
        return packer.finish(self.pad)

    def _next_document(self, position: int, room: int) -> _Held | None:
        """What goes on at `position`; None: nothing that there is room for."""
        text, vision = self._peek("text", position), None
        if position >= self._inject_at and self.mixture.ratio != 0:
            vision = self._peek("vision", position)
        if vision is None or (vision.sample.media and vision.remaining > room):
            return text
        if text is None:
            return vision
        # The deficit falls by (1 - share) * vision.remaining with the one, and grows by share * filled with the other.
        share, filled = self.mixture.vision_share(self._active(position)), min(text.remaining, room)
        least = self._phase * (1 - share) * vision.remaining - (1 - self._phase) * share * filled
        return vision if self._now.deficits.vision > least else text

    def _peek(self, group: Group, position: int) -> _Held | None:
        """The group's document that is held, or else a new one; None: the group has none (now)."""
        held = self._now.held
        while group not in held:
            candidates = [mixed for mixed in self._active(position) if mixed.group == group]
            if not candidates:
                return None
            mixed = self._now.deficits.choose(candidates, self._phase)
            drawn = self._draw(mixed)
            if drawn is not None:
                held[group] = drawn
        return held[group]

    def _active(self, position: int) -> list[MixedSource]:
        """Sources that have begun and have a document left, be it only the rest of one."""
        with_rest = {held.mixed.name for held in self._now.held.values()}
        return [
            mixed
            for mixed in self.mixture.sources
            if mixed.name in with_rest or (position >= self._start_at[mixed.name] and not self._is_used_up(mixed))
        ]

    def _is_used_up(self, mixed: MixedSource) -> bool:
        return mixed.num_documents is not None and self._place(self._now.counters[mixed.name]) >= mixed.num_documents

    def _place(self, counters: _Counters) -> int:
        """Of the source's next document for this stream, in all epochs one after another."""
        return self.number + counters.drawn * self.num_streams

    def _draw(self, mixed: MixedSource) -> _Held | None:
        """The source's next document that can be used; None: it has no more."""
        counters, size = self._now.counters[mixed.name], len(mixed.source)
        for _ in range(2 * size + 100):  # between two looks at one document lie fewer than 2 * size others
            if self._is_used_up(mixed):
                return None
            epoch, place = divmod(self._place(counters), size)
            index = Permutation(size, f"{self.seed}/{epoch}/{mixed.name}")(place)
            sample = self._sample(mixed, index, epoch)
            counters.drawn += 1
            positions = num_positions(sample)
            if positions > 0 and not (sample.media and positions > self.sequence_length):
                return _Held(mixed, index, epoch, 0, sample)
            counters.skipped += 1
        got = f"{2 * size + 100} documents in a row that cannot be used"
        accepted = (
            f"documents of at least 2 tokens, with media at most sequence_length + 1 = {self.sequence_length + 1}"
        )
        raise DataError(message("TokenStream.next", f"source {mixed.name!r}", got, accepted))

    def _sample(self, mixed: MixedSource, index: int, epoch: int) -> Sample:
        where = f"source {mixed.name!r}, document {index}, epoch {epoch}"
        try:
            sample = mixed.source.sample(index, epoch)
            sample.check(self.media_pad)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise DataError(message("TokenStream", where, got, "a document")) from error
        if sample.ids_S.dtype != np.int64 or sample.loss_S.dtype != np.bool_:
            got = f"ids_S {sample.ids_S.dtype}, loss_S {sample.loss_S.dtype}"
            raise DataError(message("TokenStream", where, got, "int64 and bool"))
        if sample.media and (not mixed.source.has_media or sample.ids_S[-1] == self.media_pad):
            got = "media at its very end" if mixed.source.has_media else "media, of a source without has_media"
            raise DataError(message("TokenStream", where, got, "media of a vision source, with a token behind"))
        return sample

    def _raise_empty(self) -> None:
        tokens = {name: counters.tokens for name, counters in self._now.counters.items()}
        got = f"no document left for stream {self.number} after {self._now.sequences} sequences, {tokens_text(tokens)}"
        hint = "train for fewer steps, raise max_epochs, or add sources"
        if self._now.sequences * self.sequence_length < self._inject_at:
            hint += f"; vision begins only at token {self._inject_at}"
        raise DataError(message("TokenStream.next", "mixture", got, "documents for the whole run", hint))


def _check_fingerprints(got: Any, wanted: list[dict[str, Any]]) -> None:
    """Raises DataError where sources of one name differ in what they say of their files."""
    sources = [entry for entry in got if isinstance(entry, Mapping)] if isinstance(got, list) else []
    for entry in wanted:
        before = [source.get("fingerprint") for source in sources if source.get("name") == entry["name"]]
        if before and before[0] != entry["fingerprint"]:
            got, hint = repr(before[0]), "its files changed since this state was saved: bring back those of then"
            if not before[0]:
                got, hint = "none in this state", "whether its files changed since then cannot be told"
            argument, accepted = f"fingerprint of source {entry['name']!r}", repr(entry["fingerprint"])
            raise DataError(message("TokenStream.restore", argument, got, accepted, f"{hint}, or start anew"))


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _state_error(repr(value), "an integer >= 0")
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise _state_error(repr(value), "a finite number")
    return float(value)


def _state_error(got: object, accepted: str = "what TokenStream.state gave") -> DataError:
    return DataError(message("TokenStream.restore", "state", got, accepted))
