"""How soon pages are used again: reuse distances and the LIR set, in O(1) amortized per access.

Both see *groups*: the pages of one sequence are read together, so they have one recency, and a group counts as many
pages as it has. A step costs O(sequences), not O(pages).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass

NUM_BUCKETS = 64


@dataclass
class _Place:
    bucket: int
    weight: int
    was_accessed: bool = False
    irr: int | None = None  # None: not accessed twice yet, so it counts as more than any


class ReuseDistance:
    """Distinct pages accessed between the last two accesses of a group (IRR), and since the last one.

    The groups lie in at most `NUM_BUCKETS` buckets by the time of their last access, and only the buckets' weights are
    added up (after the ageing buckets of Mimir, Saemundsson et al., SoCC 2014). Empty buckets vanish; when there are
    too many, the two lightest neighbours merge, so none outgrows 2 / (NUM_BUCKETS − 1) of all pages unless a single
    group does, and a distance is off by half of that at most. With few groups each has its own, and it is exact.
    """

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._starts = [0]  # oldest first: a bucket holds the places numbered from its start up to the next one's
        self._weights = [0]
        self.total = 0  # weight of all groups

    def add(self, group: int, weight: int) -> None:
        """A group that has not been accessed yet; it counts as the oldest."""
        self._places[group] = _Place(0, weight)
        self._weights[0] += weight
        self.total += weight

    def resize(self, group: int, weight: int) -> None:
        place = self._places[group]
        self._weights[self._index(place)] += weight - place.weight
        self.total += weight - place.weight
        place.weight = weight

    def remove(self, group: int) -> None:
        place = self._places.pop(group)
        self._weights[self._index(place)] -= place.weight
        self.total -= place.weight

    def accessed(self, group: int) -> None:
        place = self._places[group]
        index = self._index(place)
        if place.was_accessed:
            place.irr = self._distance(place, index)
        place.was_accessed = True
        starts, weights = self._starts, self._weights
        weights[index] -= place.weight
        number = starts[-1]
        if weights[-1] * NUM_BUCKETS >= self.total:
            number += 1
            starts.append(number)
            weights.append(0)
        weights[-1] += place.weight
        place.bucket = number
        if 0 < index < len(weights) - 1 and not weights[index]:
            self._merge(index)
        elif len(weights) > NUM_BUCKETS:
            self._merge(min(range(1, len(weights) - 1), key=lambda i: weights[i - 1] + weights[i]))

    def recency(self, group: int) -> int:
        """The larger of IRR and the pages accessed since, as LIRS compares them; all pages before a second access."""
        place = self._places[group]
        if place.irr is None:
            return self.total
        return max(place.irr, self._distance(place, self._index(place)))

    def _merge(self, index: int) -> None:
        """Merge a bucket into the one before it."""
        del self._starts[index]
        weight = self._weights.pop(index)
        self._weights[index - 1] += weight

    def _index(self, place: _Place) -> int:
        return bisect_right(self._starts, place.bucket) - 1

    def _distance(self, place: _Place, index: int) -> int:
        beside = (self._weights[index] - place.weight) // 2  # of those in its own bucket, half came later
        return sum(self._weights[index + 1 :]) + beside


@dataclass
class _Entry:
    weight: int
    hot: bool = False
    referenced: bool = False
    in_test: bool = False


class LirClock:
    """Which groups are LIR: used again at the shortest intervals, up to `lir_ratio` of all pages.

    A clock in the manner of CLOCK-Pro (Jiang, Chen, Zhang, USENIX ATC 2005). The ring holds hot groups and cold ones in
    their test period, in order of access as far as the hand has seen it. An access to a hot group sets a bit. A cold
    group accessed within its test period becomes hot: it came back sooner than some hot group did. The hand then goes
    on from the oldest: a hot group with the bit set gets another round, one without becomes cold, a test period it
    passes is over. Each step of the hand undoes one access, so an access costs O(1) amortized.
    """

    def __init__(self, lir_ratio: float) -> None:
        self._lir_ratio = lir_ratio
        self._entries: dict[int, _Entry] = {}
        self._ring: OrderedDict[int, _Entry] = OrderedDict()  # the hand stands before the first
        self._total = 0
        self._hot_weight = 0

    def add(self, group: int, weight: int) -> None:
        self._entries[group] = _Entry(weight)
        self._total += weight

    def resize(self, group: int, weight: int) -> None:
        entry = self._entries[group]
        more = weight - entry.weight
        self._total += more
        self._hot_weight += more * entry.hot
        entry.weight = weight

    def remove(self, group: int) -> None:
        entry = self._entries.pop(group)
        self._ring.pop(group, None)
        self._total -= entry.weight
        self._hot_weight -= entry.weight * entry.hot

    @property
    def lir_weight(self) -> int:
        """Pages of the LIR groups."""
        return self._hot_weight

    def is_lir(self, group: int) -> bool:
        return self._entries[group].hot

    def accessed(self, group: int) -> None:
        entry = self._entries[group]
        if entry.hot:
            entry.referenced = True
        elif entry.in_test:
            entry.in_test = False
            entry.hot = True
            self._hot_weight += entry.weight
            self._ring.move_to_end(group)
        else:
            entry.in_test = True
            self._ring[group] = entry
        if self._hot_weight > self._lir_ratio * self._total:
            self._advance()

    def _advance(self) -> None:
        """Move the hand until the hot groups fit and the oldest in the ring is hot."""
        capacity = self._lir_ratio * self._total
        while self._ring:
            group, entry = next(iter(self._ring.items()))
            if entry.hot and self._hot_weight <= capacity:
                return
            if entry.referenced:
                entry.referenced = False
                self._ring.move_to_end(group)
                continue
            del self._ring[group]
            entry.in_test = False
            if entry.hot:
                entry.hot = False
                self._hot_weight -= entry.weight
