"""Who encodes what: packs of whole clips, defined by the data alone, spread over all ranks by their cost.

The vision work of a step is known from metadata, the grids (t, h, w) of its clips, before a pixel is decoded. Patches
attend within their clip only, so that a pack of clips costs a * L + b * sum(l^2) + c: linear layers over its L patches,
attention over each clip of l patches, and the call. Patch counts alone and their squares alone misjudge it: at 6,608
patches MoonViT's linear and quadratic parts are equal.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from k25sys.errors import ArgumentValueError, message

_MAX_PASSES = 10_000  # of the refinement; each lowers the largest load or ends it
_EXCHANGE_RANKS = 16  # with which the fullest one may exchange: the least loaded


@dataclass(frozen=True, order=True)
class Clip:
    """An image or a clip of frames, by its place in the step: nothing but metadata."""

    data_rank: int
    microbatch: int
    index: int
    """Among the clips of its micro-batch, in the order of their tokens."""
    grid: tuple[int, int, int]
    """(t, h, w) in patches."""

    @property
    def home(self) -> tuple[int, int]:
        """(data rank, micro-batch): whose tokens it is among."""
        return self.data_rank, self.microbatch

    @property
    def num_patches(self) -> int:
        """t * h * w: the rows that the encoder sees."""
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True, kw_only=True)
class EncoderCost:
    """Seconds, or any unit, of one pass over a pack: per_patch * L + per_pair * sum(l^2) + per_pack."""

    per_patch: float
    per_pair: float
    per_pack: float = 0.0

    @classmethod
    def from_sizes(cls, *, dim: int, mlp_dim: int, num_layers: int) -> "EncoderCost":
        """Forward FLOPs of blocks of attention and a two-matrix MLP: 2 (4 d^2 + 2 d m) a patch and 4 d a pair, each."""
        return cls(per_patch=num_layers * (8.0 * dim * dim + 4.0 * dim * mlp_dim), per_pair=num_layers * 4.0 * dim)

    @classmethod
    def fit(cls, packs: Sequence["Pack"], seconds: Sequence[float]) -> "EncoderCost":
        """The cost from measured times: non-negative least squares of relative errors.

        Raises:
            ArgumentValueError: fewer than three packs, a time that is not > 0, or packs too alike to tell the terms.
        """
        if len(packs) != len(seconds) or len(packs) < 3 or min(seconds, default=0.0) <= 0:
            got = f"{len(packs)} packs, {len(seconds)} times"
            raise ArgumentValueError(message("EncoderCost.fit", "seconds", got, "a time > 0 for each of >= 3 packs"))
        terms = np.array([[pack.num_patches, pack.num_pairs, 1.0] for pack in packs]) / np.array(seconds)[:, None]
        scale = terms.max(0)
        if np.linalg.matrix_rank(terms / scale) < 3:
            accepted = "packs of different sizes, in clips of different sizes"
            raise ArgumentValueError(message("EncoderCost.fit", "packs", "packs that are too alike", accepted))
        best = _non_negative_fit(terms / scale) / scale
        return cls(per_patch=float(best[0]), per_pair=float(best[1]), per_pack=float(best[2]))

    def of(self, pack: "Pack") -> float:
        """The cost of one pack."""
        return self.per_patch * pack.num_patches + self.per_pair * pack.num_pairs + self.per_pack


def _non_negative_fit(terms: np.ndarray) -> np.ndarray:
    """argmin |terms x - 1| over x >= 0: three unknowns, so every set of them is tried."""
    best, least = np.zeros(3), np.inf
    for mask in range(1, 8):
        chosen = [i for i in range(3) if mask >> i & 1]
        x = np.zeros(3)
        x[chosen] = np.linalg.lstsq(terms[:, chosen], np.ones(len(terms)), rcond=None)[0]
        error = float(np.sum((terms @ x - 1) ** 2))
        if x.min() >= 0 and error < least * (1 - 1e-12):
            best, least = x, error
    return best


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Clips of one micro-batch that one call of the encoder takes together."""

    number: int
    clips: tuple[Clip, ...]

    @property
    def num_patches(self) -> int:
        """L."""
        return sum(clip.num_patches for clip in self.clips)

    @property
    def num_pairs(self) -> int:
        """sum of l^2: pairs of patches that attend to each other."""
        return sum(clip.num_patches**2 for clip in self.clips)


def make_packs(clips: Iterable[Clip], *, max_patches: int) -> tuple[Pack, ...]:
    """Fills packs with the clips of a micro-batch in order, up to `max_patches` a pack.

    A pack holds clips of one micro-batch, and packs do not depend on the number of ranks: an encoder inside stage 0
    that keeps to them computes the same products, bit for bit, and sums over packs can be made in one fixed order. A
    clip of more than `max_patches` is a pack of its own.

    Args:
        clips: of the whole step, every data rank's, or of one micro-batch. Sorted here.
        max_patches: what one call may hold, which bounds the encoder's activation memory.

    Raises:
        ArgumentValueError: max_patches below 1, or two clips in one place.
    """
    if max_patches < 1:
        raise ArgumentValueError(message("make_packs", "max_patches", max_patches, "an int >= 1"))
    packs: list[list[Clip]] = []
    room = 0
    ordered = sorted(clips)
    for before, clip in zip([None, *ordered], ordered, strict=False):
        if before is not None and (*before.home, before.index) == (*clip.home, clip.index):
            raise ArgumentValueError(message("make_packs", "clips", f"{before} and {clip}", "one clip in a place"))
        if before is None or before.home != clip.home or clip.num_patches > room:
            packs.append([])
            room = max_patches
        packs[-1].append(clip)
        room -= clip.num_patches
    return tuple(Pack(number=number, clips=tuple(members)) for number, members in enumerate(packs))


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """Which ranks encode which pack; the same on every rank, since it is computed from the same metadata."""

    packs: tuple[Pack, ...]
    owners: tuple[tuple[int, ...], ...]
    """By pack: its group of ranks. Groups of one rank today; several ranks may share one large image later."""
    loads_R: tuple[float, ...]
    """The cost that each rank carries."""
    lower_bound: float
    """No assignment of these packs to these ranks has a smaller largest load."""

    @property
    def max_over_mean(self) -> float:
        """The largest load over the mean load; 1 without work."""
        mean = sum(self.loads_R) / len(self.loads_R)
        return max(self.loads_R) / mean if mean else 1.0

    @property
    def over_lower_bound(self) -> float:
        """The largest load over the lower bound; 1 without work."""
        return max(self.loads_R) / self.lower_bound if self.lower_bound else 1.0

    def packs_of(self, rank: int) -> tuple[Pack, ...]:
        """What `rank` encodes, by ascending number."""
        return tuple(pack for pack, owners in zip(self.packs, self.owners, strict=True) if rank in owners)

    def __str__(self) -> str:
        mean = sum(self.loads_R) / len(self.loads_R)
        bound = self.lower_bound / mean if mean else 1.0
        return (
            f"{len(self.packs)} packs of {sum(pack.num_patches for pack in self.packs)} patches on {len(self.loads_R)} "
            f"ranks: max/mean {self.max_over_mean:.3f}, lower bound {bound:.3f}"
        )


def assign(
    packs: Sequence[Pack], cost: EncoderCost, num_ranks: int, *, ranks_per_node: int | None = None,
    node_of_pack: Sequence[int] | None = None, imbalance: float = 1.05,
) -> EncodingPlan:  # fmt: skip
    """Spreads packs over ranks: largest first onto the least loaded rank, then moves and swaps off the fullest one.

    Ties go to the pack of the lower number and to the lower rank, so that every rank computes the same plan.

    Args:
        packs: from make_packs.
        cost: of a pack; see EncoderCost.
        num_ranks: R, all ranks of the grid.
        ranks_per_node, node_of_pack: together: a pack stays on the node where its pixels are, unless that node's load
            is above `imbalance` times the mean; what is above moves.
        imbalance: see above; >= 1.

    Raises:
        ArgumentValueError: a number out of its range.
    """
    if num_ranks < 1:
        raise ArgumentValueError(message("assign", "num_ranks", num_ranks, "an int >= 1"))
    if (ranks_per_node is None) != (node_of_pack is None):
        got = f"{ranks_per_node} with node_of_pack {'not ' if node_of_pack is None else ''}given"
        raise ArgumentValueError(message("assign", "ranks_per_node", got, "both, or neither"))
    costs = [cost.of(pack) for pack in packs]
    ranks = [tuple(range(num_ranks))] * len(packs)
    if ranks_per_node is not None and node_of_pack is not None:
        ranks = _stay_on_nodes(costs, num_ranks, ranks_per_node, node_of_pack, imbalance)
    owner, loads = _largest_first(costs, ranks, num_ranks)
    for block in sorted(set(ranks)):
        _refine(costs, owner, loads, block)
    return EncodingPlan(
        packs=tuple(packs),
        owners=tuple((rank,) for rank in owner),
        loads_R=tuple(loads),
        lower_bound=_lower_bound(costs, num_ranks),
    )


def _by_size(costs: Sequence[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda number: (-costs[number], number))


def _largest_first(
    costs: Sequence[float], ranks: Sequence[tuple[int, ...]], num_ranks: int
) -> tuple[list[int], list[float]]:
    loads, owner = [0.0] * num_ranks, [0] * len(costs)
    heaps = {allowed: [(0.0, rank) for rank in allowed] for allowed in set(ranks)}
    for number in _by_size(costs):
        load, rank = heapq.heappop(heaps[ranks[number]])
        owner[number], loads[rank] = rank, load + costs[number]
        heapq.heappush(heaps[ranks[number]], (loads[rank], rank))
    return owner, loads


def _stay_on_nodes(
    costs: Sequence[float], num_ranks: int, ranks_per_node: int, node_of_pack: Sequence[int], imbalance: float
) -> list[tuple[int, ...]]:
    """The ranks that may encode each pack: those of its node, or of the node that its surplus goes to."""
    if num_ranks % ranks_per_node:
        accepted = f"a divisor of {num_ranks} ranks"
        raise ArgumentValueError(message("assign", "ranks_per_node", ranks_per_node, accepted))
    num_nodes = num_ranks // ranks_per_node
    if len(node_of_pack) != len(costs) or not all(0 <= node < num_nodes for node in node_of_pack):
        accepted = f"a node of 0 to {num_nodes - 1} for each of {len(costs)} packs"
        raise ArgumentValueError(message("assign", "node_of_pack", list(node_of_pack), accepted))
    if imbalance < 1:
        raise ArgumentValueError(message("assign", "imbalance", imbalance, "a number >= 1"))
    loads, node = [0.0] * num_nodes, list(node_of_pack)
    for number, home in enumerate(node):
        loads[home] += costs[number]
    limit = imbalance * sum(loads) / num_nodes
    for number in _by_size(costs):
        least = min(range(num_nodes), key=lambda other: (loads[other], other))
        home = node[number]
        if loads[home] > limit and loads[least] + costs[number] < loads[home]:
            node[number] = least
            loads[home] -= costs[number]
            loads[least] += costs[number]
    blocks = [tuple(range(i * ranks_per_node, (i + 1) * ranks_per_node)) for i in range(num_nodes)]
    return [blocks[home] for home in node]


def _refine(costs: Sequence[float], owner: list[int], loads: list[float], block: tuple[int, ...]) -> None:
    """Moves a pack off the fullest rank of `block`, or swaps it for a smaller one, while the larger load falls."""
    held: list[list[int]] = [[] for _ in block]
    for number, rank in enumerate(owner):
        if rank in block:
            held[rank - block[0]].append(number)
    loads_R = np.array([loads[rank] for rank in block])
    for _ in range(_MAX_PASSES):
        full = int(loads_R.argmax())
        found = _best_exchange(costs, held, loads_R, full)
        if found is None:
            break
        number, rank, back = found
        for moved, source, target in ((number, full, rank), *(((back, rank, full),) if back is not None else ())):
            held[source].remove(moved)
            held[target].append(moved)
            owner[moved] = block[target]
        for changed in (full, rank):  # summed anew, in a fixed order: no rounding piles up
            held[changed].sort()
            loads_R[changed] = sum(costs[moved] for moved in held[changed])
    for rank, load in zip(block, loads_R.tolist(), strict=True):
        loads[rank] = load


def _best_exchange(
    costs: Sequence[float], held: Sequence[Sequence[int]], loads_R: np.ndarray, full: int
) -> tuple[int, int, int | None] | None:
    """(pack of the fullest rank, other rank, pack that comes back or None) that lowers the larger load most, if any."""
    least_loaded = loads_R.argsort(kind="stable")[:_EXCHANGE_RANKS].tolist()
    others = [(rank, back) for rank in least_loaded if rank != full for back in (None, *held[rank])]
    if not others:
        return None
    ranks = np.array([rank for rank, _ in others])
    gains = np.array([0.0 if back is None else costs[back] for _, back in others])
    best, least = None, float(loads_R[full]) * (1 - 1e-9)
    for number in held[full]:
        moved = costs[number] - gains
        larger = np.maximum(loads_R[full] - moved, loads_R[ranks] + moved)
        at = int(larger.argmin())
        if larger[at] < least:
            best, least = (number, *others[at]), float(larger[at])
    return best


def _lower_bound(costs: Sequence[float], num_ranks: int) -> float:
    """The mean, the largest, and, for every k, the k + 1 smallest of the k R + 1 largest, which meet on some rank."""
    falling = sorted(costs, reverse=True)
    sums = [0.0, *accumulate(falling)]
    bound = max(sums[-1] / num_ranks, falling[0] if falling else 0.0)
    for k in range(1, (len(falling) - 1) // num_ranks + 1):
        last = k * num_ranks + 1
        bound = max(bound, sums[last] - sums[last - k - 1])
    return bound
