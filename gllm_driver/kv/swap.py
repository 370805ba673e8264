"""HGAL, hybrid gang-aware LIRS: which sequences' pages leave the device when others need room.

The unit is the group, all pages of one sequence on the device, so that no sequence is ever half here and half there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..config import SwapConfig
from .recency import LirClock, ReuseDistance

IDLE_WEIGHT = 1000.0  # a second of idleness; so a minute outweighs the recency of any but the largest groups
FREQUENCY_WEIGHT = 1.0  # an access counts as much as a page of recency or a millisecond


@dataclass(frozen=True)
class Candidate:
    """A group that may leave the device. `pages` are its device pages, shared ones among them."""

    group: int
    pages: Sequence[int]
    access_count: int
    last_access: float | None
    swap_in_time: float | None = None


class VictimPolicy(Protocol):
    """What decides the order of eviction. Weights are pages."""

    def added(self, group: int, weight: int) -> None: ...
    def resized(self, group: int, weight: int) -> None: ...
    def removed(self, group: int) -> None: ...
    def accessed(self, group: int) -> None: ...
    def recency(self, group: int) -> int: ...
    def is_lir(self, group: int) -> bool: ...

    def ranked(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        """The candidates, those to go first first."""


class Hgal:
    """Scores groups by idle time, recency and frequency; groups in the LIR set go after all others.

    After those come groups swapped in within `warmup_duration`, though they may have been used enough to be Warm no
    more: to send them back would be thrash. The score alone grows with a group's size, so a large sequence in constant
    use could score above small ones that are not; the LIR set keeps it. Pinned, Warm and Protected groups never come
    here, so they need no bonus.
    """

    def __init__(self, config: SwapConfig) -> None:
        self._distance = ReuseDistance()
        self._clock = LirClock(config.lir_ratio)
        self._warmup_s = config.warmup_duration

    def added(self, group: int, weight: int) -> None:
        self._distance.add(group, weight)
        self._clock.add(group, weight)

    def resized(self, group: int, weight: int) -> None:
        self._distance.resize(group, weight)
        self._clock.resize(group, weight)

    def removed(self, group: int) -> None:
        self._distance.remove(group)
        self._clock.remove(group)

    def accessed(self, group: int) -> None:
        self._distance.accessed(group)
        self._clock.accessed(group)

    def recency(self, group: int) -> int:
        return self._distance.recency(group)

    def is_lir(self, group: int) -> bool:
        return self._clock.is_lir(group)

    def score(self, candidate: Candidate, now: float) -> float:
        """Milliseconds since the last access + sum of the recency of its pages − accesses; the highest is coldest."""
        idle_s = now - candidate.last_access if candidate.last_access is not None else 0.0
        recency = self.recency(candidate.group) * len(candidate.pages)
        return IDLE_WEIGHT * idle_s + recency - candidate.access_count * FREQUENCY_WEIGHT

    def ranked(self, candidates: Iterable[Candidate], now: float) -> list[Candidate]:
        def order(c: Candidate) -> tuple[bool, bool, float, int]:
            is_fresh = c.swap_in_time is not None and now < c.swap_in_time + self._warmup_s
            return is_fresh, self.is_lir(c.group), -self.score(c, now), c.group

        return sorted(candidates, key=order)


def fewest_groups(
    ranked: Iterable[Candidate],
    wanted: int,
    *,
    holders: Callable[[int], int],
    needs_slot: Callable[[int], bool],
    free_slots: int,
) -> tuple[list[Candidate], int]:
    """The fewest groups, coldest first, that free `wanted` pages, and how many they free.

    Groups are taken in order until enough pages come free, then those are put back that turn out not to be needed,
    warmest first. A page comes free when all its holders (`holders(page)`) are among the chosen. A group whose pages do
    not fit in the host slots left is passed over. Less than `wanted` is freed when there is no more.
    """
    chosen: list[Candidate] = []
    taken: Counter[int] = Counter()
    freed = 0
    for candidate in ranked:
        if freed >= wanted:
            break
        slots = sum(1 for page in candidate.pages if not taken[page] and needs_slot(page))
        gained = sum(1 for page in candidate.pages if taken[page] + 1 == holders(page))
        if slots > free_slots:
            continue
        free_slots -= slots
        freed += gained
        taken.update(candidate.pages)
        chosen.append(candidate)
    enough = min(wanted, freed)
    for candidate in chosen[::-1]:
        lost = sum(1 for page in candidate.pages if taken[page] == holders(page))
        if freed - lost >= enough:
            taken.subtract(candidate.pages)
            freed -= lost
            chosen.remove(candidate)
    return chosen, freed
