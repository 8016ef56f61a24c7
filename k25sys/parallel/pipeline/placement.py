"""Which layers each stage gets, by what they cost."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf, isfinite

from k25sys.errors import ScheduleError, message


def place_layers(
    costs: Sequence[float], num_stages: int, *, first_extra: float = 0.0, last_extra: float = 0.0
) -> tuple[range, ...]:
    """Cuts the layers into stages, one layer or more each, such that the dearest stage is as cheap as it can be; of all
    such cuts one with the least sum of squares, so that the others are alike too. Exact, in O(stages x layers^2).

    Args:
        costs: Of each layer, e.g. seconds of forward and backward: a dense layer and one with experts differ.
        num_stages: Pipeline ranks times virtual stages.
        first_extra: What the first stage does besides its layers: the embedding, an encoder.
        last_extra: Of the last stage: the head and the loss.

    Returns:
        The layers of each stage.

    Raises:
        ScheduleError: more stages than layers; a cost that is negative or not finite.
    """
    num_layers = len(costs)
    if not isinstance(num_stages, int) or isinstance(num_stages, bool) or not 1 <= num_stages <= num_layers:
        accepted = f"an int from 1 to {num_layers}, the number of layers"
        raise ScheduleError(message("place_layers", "num_stages", repr(num_stages), accepted))
    named = {f"costs[{i}]": cost for i, cost in enumerate(costs)} | {
        "first_extra": first_extra,
        "last_extra": last_extra,
    }
    for name, number in named.items():
        if not isfinite(number) or number < 0:
            raise ScheduleError(message("place_layers", name, number, "a finite number >= 0"))

    sums = list(accumulate(costs, initial=0.0))

    def cost(stage: int, begin: int, end: int) -> float:
        extra = first_extra * (stage == 0) + last_extra * (stage == num_stages - 1)
        return sums[end] - sums[begin] + extra

    def cut(most: float) -> tuple[float, list[int]]:
        """With `most` infinite the least maximum of the costs, else their least sum of squares, none above `most`."""
        best, cuts = [0.0] + [inf] * num_layers, []
        for stage in range(num_stages):
            found, begins = [inf] * (num_layers + 1), [0] * (num_layers + 1)
            for end in range(stage + 1, num_layers + 1):
                for begin in range(stage, end):
                    each = cost(stage, begin, end)
                    total = max(best[begin], each) if most == inf else best[begin] + (each / (most or 1.0)) ** 2
                    if each <= most and total < found[end]:
                        found[end], begins[end] = total, begin
            best = found
            cuts.append(begins)
        ends = [num_layers]
        for begins in reversed(cuts):
            ends.append(begins[ends[-1]])
        return best[num_layers], ends[::-1]

    least, _ = cut(inf)
    _, bounds = cut(least)
    return tuple(range(begin, end) for begin, end in pairwise(bounds))
