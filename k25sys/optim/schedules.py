"""Learning rates by step: WSD (warm-up, stable, decay) as K2 was trained, and cosine. Steps count from 1.

Each phase ends on the rate at which the next one starts, so that a rate changes by little from step to step. A warm-up
is linear from 0; step k of n has k / n of the peak. After its last phase a schedule stays at its last rate.
"""

from dataclasses import dataclass
from math import ceil, cos, isfinite, pi
from typing import Protocol

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message

DECAYS = ("cosine", "linear")
K2_TOKENS_PER_STEP = 67_000_000
"""As section 2.5 of the K2 report rounds it."""


class Schedule(Protocol):
    """What a training loop asks for a rate."""

    def learning_rate(self, step: int) -> float:
        """The rate of a step, from 1.

        Raises:
            ArgumentTypeError: a step that is no int. ArgumentValueError: one below 1.
        """
        ...


def steps_of_tokens(tokens: float, tokens_per_step: int) -> int:
    """The first number of steps that see at least so many tokens.

    Raises:
        ArgumentValueError: negative or infinite tokens, or a step of none.
    """
    if not (isfinite(tokens) and tokens >= 0):
        raise ArgumentValueError(message("steps_of_tokens", "tokens", tokens, "a finite number >= 0"))
    if tokens_per_step < 1:
        raise ArgumentValueError(message("steps_of_tokens", "tokens_per_step", tokens_per_step, "an int >= 1"))
    return ceil(tokens / tokens_per_step)


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay, and an anneal that goes lower still where one follows.

    Raises:
        ArgumentTypeError: a length that is no int. ArgumentValueError: a length below 0, a rate that is negative, not
            finite or rises where it should fall, an unknown decay, or an anneal with one of its two fields.
    """

    peak: float
    final: float
    """After the decay."""
    warmup_steps: int
    stable_steps: int
    """At the peak, the warm-up's not among them."""
    decay_steps: int
    decay: str = "cosine"
    """One of DECAYS, of the anneal too."""
    anneal_steps: int = 0
    anneal_final: float | None = None

    def __post_init__(self) -> None:
        _check_lengths("WSD", self, "warmup_steps", "stable_steps", "decay_steps", "anneal_steps")
        _check_rates("WSD", {"peak": self.peak, "final": self.final})
        if self.decay not in DECAYS:
            raise ArgumentValueError(message("WSD", "decay", repr(self.decay), " or ".join(map(repr, DECAYS))))
        if (self.anneal_final is None) != (self.anneal_steps == 0):
            got = f"{self.anneal_final} with anneal_steps={self.anneal_steps}"
            raise ArgumentValueError(message("WSD", "anneal_final", got, "a rate and steps, or None and 0 steps"))
        if self.anneal_final is not None:
            _check_rates("WSD", {"final": self.final, "anneal_final": self.anneal_final})

    @classmethod
    def from_tokens(
        cls, *, peak: float, final: float, warmup_steps: int, stable_tokens: float, decay_tokens: float,
        tokens_per_step: int, decay: str = "cosine", anneal_tokens: float = 0, anneal_final: float | None = None,
    ) -> "WSD":  # fmt: skip
        """Phases as long as it takes to see so many tokens.

        Args:
            warmup_steps: a number of steps, and part of the stable tokens, as reports count them.
            tokens_per_step: of the global batch.

        Raises:
            ArgumentValueError: see WSD; a warm-up that sees more than the stable tokens.
        """
        stable = steps_of_tokens(stable_tokens, tokens_per_step)
        if warmup_steps > stable:
            got = f"{warmup_steps}, {warmup_steps * tokens_per_step:.3g} tokens"
            accepted = f"no more than the {stable} steps of stable_tokens"
            raise ArgumentValueError(message("WSD.from_tokens", "warmup_steps", got, accepted))
        # Ends are rounded, not lengths: else every phase would push the following ones back by up to a step.
        decayed = steps_of_tokens(stable_tokens + decay_tokens, tokens_per_step)
        annealed = steps_of_tokens(stable_tokens + decay_tokens + anneal_tokens, tokens_per_step)
        return cls(
            peak=peak, final=final, warmup_steps=warmup_steps, stable_steps=stable - warmup_steps,
            decay_steps=decayed - stable, decay=decay, anneal_steps=annealed - decayed, anneal_final=anneal_final,
        )  # fmt: skip

    @classmethod
    def k2(cls, *, tokens_per_step: int = K2_TOKENS_PER_STEP) -> "WSD":
        """Kimi K2's (section 2.5 of its report): 500 steps of warm-up, 2e-4 until 10T tokens, cosine to 2e-5 over 5.5T,
        anneal to 7e-6 over 400B and 60B of longer context. K2.5's own is not disclosed, nor the shape of the anneal."""
        return cls.from_tokens(
            peak=2e-4, final=2e-5, warmup_steps=500, stable_tokens=10e12, decay_tokens=5.5e12,
            tokens_per_step=tokens_per_step, anneal_tokens=460e9, anneal_final=7e-6,
        )  # fmt: skip

    @property
    def num_steps(self) -> int:
        """Of all phases."""
        return self.warmup_steps + self.stable_steps + self.decay_steps + self.anneal_steps

    def learning_rate(self, step: int) -> float:
        """See Schedule."""
        _check_step("WSD", step)
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        step -= self.warmup_steps + self.stable_steps
        if step <= 0:
            return self.peak
        if step <= self.decay_steps:
            return _between(self.peak, self.final, step / self.decay_steps, self.decay)
        step -= self.decay_steps
        if self.anneal_final is None:
            return self.final
        return _between(self.final, self.anneal_final, min(1.0, step / self.anneal_steps), self.decay)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up, then half a cosine down to the end.

    Raises:
        ArgumentTypeError: a length that is no int. ArgumentValueError: a length below 0, a warm-up longer than the
            whole, a rate that is negative, not finite or rises.
    """

    peak: float
    final: float
    warmup_steps: int
    num_steps: int
    """The warm-up's among them."""

    def __post_init__(self) -> None:
        _check_lengths("Cosine", self, "warmup_steps", "num_steps")
        _check_rates("Cosine", {"peak": self.peak, "final": self.final})
        if self.warmup_steps > self.num_steps:
            raise ArgumentValueError(
                message("Cosine", "warmup_steps", self.warmup_steps, f"no more than num_steps, {self.num_steps}")
            )

    @classmethod
    def from_tokens(
        cls, *, peak: float, final: float, warmup_steps: int, num_tokens: float, tokens_per_step: int
    ) -> "Cosine":
        """As long as it takes to see so many tokens, those of the warm-up among them.

        Args:
            tokens_per_step: of the global batch.
        """
        num_steps = steps_of_tokens(num_tokens, tokens_per_step)
        return cls(peak=peak, final=final, warmup_steps=warmup_steps, num_steps=num_steps)

    def learning_rate(self, step: int) -> float:
        """See Schedule."""
        _check_step("Cosine", step)
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if step >= self.num_steps:
            return self.final
        done = (step - self.warmup_steps) / (self.num_steps - self.warmup_steps)
        return _between(self.peak, self.final, done, "cosine")


def _between(start: float, end: float, done: float, shape: str) -> float:
    left = 1 - done if shape == "linear" else 0.5 + 0.5 * cos(pi * done)
    return end + (start - end) * left


def _check_step(op: str, step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int):
        raise ArgumentTypeError(message(f"{op}.learning_rate", "step", type(step).__name__, "an int"))
    if step < 1:
        raise ArgumentValueError(message(f"{op}.learning_rate", "step", step, "an int >= 1", "steps count from 1"))


def _check_lengths(op: str, schedule: object, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(message(op, name, repr(value), "an int", "from_tokens takes tokens"))
        if value < 0:
            raise ArgumentValueError(message(op, name, value, "an int >= 0"))


def _check_rates(op: str, rates: dict[str, float]) -> None:
    """Each at most the one before."""
    limit = float("inf")
    for name, value in rates.items():
        if not (isfinite(value) and 0 <= value <= limit):
            accepted = "a finite number >= 0" + (f", no more than {limit:g}" if isfinite(limit) else "")
            raise ArgumentValueError(message(op, name, value, accepted))
        limit = value
