"""Which parameters learn faster, slower or not at all: groups by patterns of their names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite

from k25sys.errors import ArgumentValueError, listing, message
from k25sys.optim.muon_clip import MuonClipConfig


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters whose released names match, and what is different about them.

    Raises:
        ArgumentValueError: a number out of its range.
    """

    pattern: str
    """Of shell kind, for the whole name: "vision_tower.*", "*.embed_tokens.weight"."""
    learning_rate_scale: float = 1.0
    weight_decay: float | None = None
    """None is the config's."""
    frozen: bool = False
    """They get no gradient and no update, and have no state."""

    def __post_init__(self) -> None:
        for name, value in (("learning_rate_scale", self.learning_rate_scale), ("weight_decay", self.weight_decay)):
            if value is not None and not (isfinite(value) and value >= 0):
                raise ArgumentValueError(message("ParameterGroup", name, value, "a finite number >= 0"))


@dataclass(frozen=True)
class GroupRule:
    """What a parameter is updated by."""

    learning_rate_scale: float
    config: MuonClipConfig


def match_groups(names: Iterable[str], groups: Sequence[ParameterGroup]) -> dict[str, int]:
    """By name, the first group that matches; names that none matches are left out."""
    found = {}
    for name in names:
        numbers = (number for number, group in enumerate(groups) if fnmatchcase(name, group.pattern))
        number = next(numbers, None)
        if number is not None:
            found[name] = number
    return found


def check_groups_used(groups: Sequence[ParameterGroup], counts: Sequence[int]) -> None:
    """Refuses a group that decides about nothing.

    Args:
        counts: of each, the parameters of the whole model that it is the first to match.

    Raises:
        ArgumentValueError: naming the patterns.
    """
    idle = [repr(group.pattern) for group, count in zip(groups, counts, strict=True) if not count]
    if idle:
        accepted = "patterns that match a parameter which no group before them matches"
        hint = "patterns are of shell kind and match whole released names, as vision_tower.*"
        raise ArgumentValueError(message("ZeroOptimizer", "groups", listing(idle), accepted, hint))


def rules(
    matched: Mapping[str, int], names: Iterable[str], groups: Sequence[ParameterGroup], config: MuonClipConfig
) -> dict[str, GroupRule]:
    """By name, what each parameter is updated by: of one group, one and the same object."""
    rest = GroupRule(1.0, config)
    each = [
        GroupRule(
            group.learning_rate_scale,
            config if group.weight_decay is None else replace(config, weight_decay=group.weight_decay),
        )
        for group in groups
    ]
    return {name: each[matched[name]] if name in matched else rest for name in names}
