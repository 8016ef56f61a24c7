"""Which source the next document comes from: wanted shares of tokens, by group (vision, text) and by source.

Source: spec section 3.2. Nothing is drawn by lot: what is owed most tokens comes next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from k25sys.data.sample import Source
from k25sys.errors import ArgumentTypeError, ArgumentValueError, message

Group = Literal["text", "vision"]
GROUPS: tuple[Group, Group] = ("text", "vision")


@dataclass(frozen=True)
class MixedSource:
    """A source and how much of it a mixture takes.

    Raises:
        ValueError: an empty source, or a number out of its range.
    """

    source: Source
    weight: float
    """> 0: its share of its group's tokens is weight / sum of the group's weights."""
    max_epochs: int | None = None
    """It leaves the mixture after so many passes, and the others take its share; None: never."""
    start: float = 0.0
    """In [0, 1): the share of the whole run's tokens after which it is drawn from."""

    def __post_init__(self) -> None:
        name = f"source {self.name!r}"
        if len(self.source) < 1:
            raise ArgumentValueError(message("MixedSource", name, "0 documents", "at least 1"))
        if not 0 < self.weight < float("inf"):
            raise ArgumentValueError(message("MixedSource", f"weight of {name}", self.weight, "a finite number > 0"))
        if self.max_epochs is not None and (not isinstance(self.max_epochs, int) or self.max_epochs < 1):
            raise ArgumentValueError(
                message("MixedSource", f"max_epochs of {name}", self.max_epochs, "an integer >= 1, or None")
            )
        if not 0 <= self.start < 1:
            raise ArgumentValueError(message("MixedSource", f"start of {name}", self.start, "a share in [0, 1)"))

    @property
    def name(self) -> str:
        """The source's."""
        return self.source.name

    @property
    def group(self) -> Group:
        """Vision is every source whose documents have media."""
        return "vision" if self.source.has_media else "text"

    @property
    def num_documents(self) -> int | None:
        """Of all its passes; None: endless."""
        return None if self.max_epochs is None else self.max_epochs * len(self.source)


class Mixture:
    """Sources in two groups, with the vision share of the whole run's tokens and the point from which it is drawn."""

    def __init__(
        self, sources: Sequence[MixedSource], *, vision_budget: float | None = None, inject: float = 0.0
    ) -> None:
        """
        Args:
            sources: with different names.
            vision_budget: b, the share of the whole run's tokens that come from vision sources (all tokens of their
                documents). None: the groups share as the weights of all sources say.
            inject: i, the share of the whole run's tokens before the first vision token. From there the share of
                vision is b / (1 - i), so that early, mid and late injection see equally many vision tokens.

        Raises:
            ValueError: no sources, one name twice, a budget that cannot be met from the injection on, a budget for a
                group without sources, or no source to begin with.
            TypeError: something else than a MixedSource.
        """
        for place, mixed in enumerate(sources):
            if not isinstance(mixed, MixedSource):
                raise ArgumentTypeError(message("Mixture", f"sources[{place}]", type(mixed).__name__, "a MixedSource"))
        self.sources = tuple(sources)
        self.vision_budget = vision_budget
        self.inject = inject
        self._check()

    def _check(self) -> None:
        names = [mixed.name for mixed in self.sources]
        if not names or len(set(names)) < len(names):
            raise ArgumentValueError(message("Mixture", "sources", f"the names {names}", "one or more different names"))
        if not 0 <= self.inject < 1:
            raise ArgumentValueError(message("Mixture", "inject", self.inject, "a share in [0, 1)"))
        budget = self.vision_budget
        if budget is None:
            if self.inject > 0:
                hint = "say which share of the run is vision"
                raise ArgumentValueError(message("Mixture", "vision_budget", "None with inject > 0", "a share", hint))
        elif not 0 <= budget <= 1 - self.inject + 1e-12:
            accepted = f"0 to 1 - inject = {1 - self.inject:g}"
            raise ArgumentValueError(message("Mixture", "vision_budget", budget, accepted))
        groups = {mixed.group for mixed in self.sources}
        if budget is not None and budget > 0 and "vision" not in groups:
            raise ArgumentValueError(message("Mixture", "vision_budget", budget, "0 or None: no source has media"))
        if budget is not None and budget < 1 and "text" not in groups:
            raise ArgumentValueError(message("Mixture", "vision_budget", budget, "1 or None: all sources have media"))
        first = groups if self.inject == 0 and budget != 0 else {"text"}
        if not any(mixed.start == 0 and mixed.group in first for mixed in self.sources):
            accepted = f"0 for at least one {' or '.join(sorted(first))} source: the run begins with it"
            raise ArgumentValueError(message("Mixture", "start", [mixed.start for mixed in self.sources], accepted))

    @property
    def ratio(self) -> float | None:
        """Vision share from the point of injection on, b / (1 - i)."""
        return None if self.vision_budget is None else min(1.0, self.vision_budget / (1 - self.inject))

    def vision_share(self, active: Sequence[MixedSource]) -> float:
        """Wanted share of vision tokens after the injection, among sources that are there."""
        weights = {group: sum(mixed.weight for mixed in active if mixed.group == group) for group in GROUPS}
        if weights["vision"] == 0 or weights["text"] == 0:
            return float(weights["vision"] > 0 and self.ratio != 0)
        return weights["vision"] / sum(weights.values()) if self.ratio is None else self.ratio


@dataclass
class Deficits:
    """Tokens owed to vision (to text: the negative), and to each source within its group.

    Only shares among sources that are there at the time count: one that leaves or has not begun is owed nothing.
    """

    vision: float
    sources: dict[str, float]

    def choose(self, candidates: Sequence[MixedSource], phase: float) -> MixedSource:
        """The one that is owed most. Of equals, the one at `phase` (in [0, 1)) of their cumulated weights."""
        most = max(self.sources[mixed.name] for mixed in candidates)
        equals = [mixed for mixed in candidates if self.sources[mixed.name] == most]
        total = sum(mixed.weight for mixed in equals)
        ends = accumulate(mixed.weight for mixed in equals)
        return next((mixed for mixed, end in zip(equals, ends, strict=True) if phase * total < end), equals[-1])

    def charge(self, taken: MixedSource, tokens: int, active: Sequence[MixedSource], vision_tokens: float) -> None:
        """Books `tokens` of a source.

        Args:
            taken: where they came from.
            tokens: how many.
            active: the sources that are there, `taken` among them.
            vision_tokens: as many of them as vision should have had.
        """
        if len({mixed.group for mixed in active}) == 2:
            self.vision += vision_tokens - (tokens if taken.group == "vision" else 0)
        peers = [mixed for mixed in active if mixed.group == taken.group]
        total = sum(mixed.weight for mixed in peers)
        for mixed in peers:
            self.sources[mixed.name] += tokens * mixed.weight / total
        self.sources[taken.name] -= tokens


def tokens_text(tokens_by_source: Mapping[str, int]) -> str:
    """How many tokens there were, for a message."""
    listed = ", ".join(f"{name} {count}" for name, count in tokens_by_source.items())
    return f"{sum(tokens_by_source.values())} tokens ({listed})"
