"""From scores of samples to one number: avg@k with its standard error, and pass@k without bias."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message


@dataclass(frozen=True, kw_only=True)
class Average:
    """avg@k: the mean over problems of the mean over a problem's samples."""

    mean: float
    standard_error: float | None
    """Of the mean, over problems and samples; None of a single problem, which says nothing about others."""
    num_problems: int
    num_samples: int
    """k."""


def average_at_k(scores_NK: Sequence[Sequence[float]]) -> Average:
    """The average of N problems with K samples each.

    Samples of one problem are not independent, so the standard error is that of the N problem means:
    sqrt(sum((m_i - m)^2) / (N - 1) / N). Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640), section 2.

    Raises:
        ValueError: no problem, no sample, problems with different numbers of samples, a score that is NaN or infinite.
    """
    counts = {len(scores) for scores in scores_NK}
    if len(counts) != 1 or 0 in counts:
        got = f"{len(scores_NK)} problems with {sorted(counts)} samples"
        raise ArgumentValueError(message("average_at_k", "scores_NK", got, "as many samples of each, at least one"))
    for i, scores in enumerate(scores_NK):
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, Real):
                raise ArgumentTypeError(message("average_at_k", f"scores_NK[{i}]", repr(score), "numbers"))
            if not math.isfinite(score):
                raise ArgumentValueError(message("average_at_k", f"scores_NK[{i}]", score, "finite numbers"))
    means = [math.fsum(scores) / len(scores) for scores in scores_NK]
    n = len(means)
    mean = math.fsum(means) / n
    error = math.sqrt(math.fsum((m - mean) ** 2 for m in means) / (n - 1) / n) if n > 1 else None
    return Average(mean=mean, standard_error=error, num_problems=n, num_samples=counts.pop())


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of `num_samples` samples, drawn without putting back, hold a correct one.

    1 - C(n - c, k) / C(n, k), in whole numbers until the last division. Source: Chen et al., Evaluating Large Language
    Models Trained on Code (arXiv 2107.03374), equation 1.

    Raises:
        TypeError, ValueError: not 0 <= num_correct <= num_samples, or not 1 <= k <= num_samples.
    """
    for name, count in (("num_samples", num_samples), ("num_correct", num_correct), ("k", k)):
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise ArgumentTypeError(message("pass_at_k", name, repr(count), "an int"))
    if not 0 <= num_correct <= num_samples:
        raise ArgumentValueError(message("pass_at_k", "num_correct", num_correct, f"0 to {num_samples}"))
    if not 1 <= k <= num_samples:
        raise ArgumentValueError(message("pass_at_k", "k", k, f"1 to {num_samples}, the samples there are"))
    all_draws = math.comb(num_samples, k)
    return (all_draws - math.comb(num_samples - num_correct, k)) / all_draws
