"""Untimed execution of a schedule: which actions can go on, and who waits for whom when none can."""

from collections import Counter, defaultdict
from typing import Literal

from k25sys.errors import listing
from k25sys.parallel.pipeline.ir import COMMUNICATION, Action, Schedule, dependencies

Sends = Literal["rendezvous", "buffered"]
"""Whether a send and its receive wait for each other, or a send goes on at once."""


class Execution:
    """Every rank goes through its actions in order, as far as it can."""

    def __init__(self, schedule: Schedule, sends: Sends) -> None:
        self._orders = {rank: list(actions) for rank, actions in schedule.actions.items()}
        self._positions = dict.fromkeys(self._orders, 0)
        self._ended: set[Action] = set()
        """By all ranks that have them."""
        self._left: Counter[Action] = Counter(action for order in self._orders.values() for action in order)
        self._needs = dependencies(schedule)
        self._sends = sends
        self._ranks: defaultdict[Action, list[int]] = defaultdict(list)
        for rank, actions in self._orders.items():
            for action in actions:
                self._ranks[action].append(rank)
        self._waiting: defaultdict[Action, list[int]] = defaultdict(list)
        """Ranks to try again when an action has ended."""

    @property
    def actions(self) -> dict[int, tuple[Action, ...]]:
        """By rank, in order."""
        return {rank: tuple(order) for rank, order in self._orders.items()}

    def heads(self) -> dict[int, Action]:
        """By rank that has not reached its end, the action that it does next."""
        return {rank: action for rank in self._orders if (action := self._head(rank)) is not None}

    def move_to_head(self, rank: int, action: Action) -> None:
        """Lets `rank` do a later `action` next."""
        order = self._orders[rank]
        order.remove(action)
        order.insert(self._positions[rank], action)

    def waits_for(self, rank: int) -> str:
        """What keeps `rank` from its next action, in words."""
        action = self._head(rank)
        assert action is not None, rank
        for party_rank, party in self._parties(rank, action):
            if self._head(party_rank) != party:
                return f"rank {party_rank} to reach {party}"
        need = self._open_need(rank, action)
        assert need is not None, action
        return f"{need} of rank {listing(map(str, self._ranks[need]))}"

    def run(self) -> bool:
        """Goes as far as possible; True when every rank has reached its end."""
        ready = dict.fromkeys(self._orders)
        while ready:
            rank, _ = ready.popitem()
            while (action := self._head(rank)) is not None:
                parties = self._parties(rank, action)
                if any(self._head(party_rank) != party for party_rank, party in parties):
                    break  # whoever reaches it last goes on for all
                need = self._open_need(rank, action)
                if need is not None:
                    self._waiting[need].append(rank)
                    break
                ready.update(dict.fromkeys(party_rank for party_rank, _ in parties))
                for party_rank, party in parties:
                    self._positions[party_rank] += 1
                    self._left[party] -= 1
                    if self._left[party]:
                        continue
                    self._ended.add(party)
                    ready.update(dict.fromkeys(self._waiting.pop(party, ())))
        return not self.heads()

    def _head(self, rank: int) -> Action | None:
        order, position = self._orders[rank], self._positions[rank]
        return order[position] if position < len(order) else None

    def _parties(self, rank: int, action: Action) -> list[tuple[int, Action]]:
        """The actions, with their ranks, that go on together with `action`."""
        if action.kind in COMMUNICATION and self._sends == "rendezvous":
            partner = action.partner
            return [(rank, action), *((other, partner) for other in self._ranks[partner])]
        return [(rank, action)]

    def _open_need(self, rank: int, action: Action) -> Action | None:
        parties = [party for _, party in self._parties(rank, action)]
        needs = (need for party in parties for need in self._needs[party])
        return next((need for need in needs if need not in self._ended and need not in parties), None)
