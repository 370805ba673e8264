"""Whether loading KV pays: seconds that moving and computing it take, learnt from what they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.8  # loading must take less than this share of computing
WEIGHT = 0.25  # of a new measurement
MAX_STEP = 4.0  # a measurement counts as at most this multiple of what was expected, or this part of it
DRIFT = 0.05  # towards the start value at each load that is skipped: a bad moment must not count for ever


@dataclass(frozen=True)
class Link:
    """What it takes to get bytes from a tier: a wait, then bytes at a rate."""

    latency_s: float
    s_per_byte: float

    def seconds(self, nbytes: int) -> float:
        return self.latency_s + nbytes * self.s_per_byte


# What the tiers of a usual machine do, checksums included, until it is known what those of this one do.
START = {"memory": Link(5e-5, 1 / 3e9), "disk": Link(5e-4, 1 / 1e9), "redis": Link(1e-3, 1 / 0.5e9)}
UNKNOWN = START["redis"]


@dataclass(frozen=True)
class Stretch:
    """A chunk that could be loaded: from which tier, how many bytes, and how many tokens need not be computed then."""

    tier: str
    nbytes: int
    num_tokens: int


class LoadCosts:
    """Estimates of both. Any thread may ask; each kind of measurement comes from one thread.

    token_s: seconds of prefill a token takes, until steps have been measured. landing_s_per_byte: of the copy from
    host memory to the device. always: load whatever it costs.
    """

    def __init__(self, token_s: float, landing_s_per_byte: float, *, always: bool = False) -> None:
        self.token_s = token_s
        self._always = always
        self._landing_s_per_byte = landing_s_per_byte
        self._links: dict[str, Link] = {}

    def computed(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens."""
        self.token_s = _blended(self.token_s, seconds / num_tokens)

    def loaded(self, tier: str, nbytes: int, seconds: float) -> None:
        """A tier answered with so many bytes."""
        link = self.link(tier)
        rate = max(seconds - link.latency_s, 0.0) / max(nbytes, 1)
        self._links[tier] = Link(link.latency_s, _blended(link.s_per_byte, rate))

    def link(self, tier: str) -> Link:
        """What is expected of a tier. "disk:/a" starts as "disk" does."""
        found = self._links.get(tier)
        return found if found is not None else START.get(tier.partition(":")[0], UNKNOWN)

    def compute_s(self, num_tokens: int) -> float:
        return num_tokens * self.token_s

    def num_worth_loading(self, stretches: Sequence[Stretch]) -> int:
        """How many of the stretches, which follow one another, to load: those that together save the most."""
        if self._always:
            return len(stretches)
        best = saved = 0.0
        count = 0
        last_tier = None
        for i, stretch in enumerate(stretches, 1):
            link = self.link(stretch.tier)
            moving = stretch.nbytes * (link.s_per_byte + self._landing_s_per_byte)
            if stretch.tier != last_tier:  # chunks are asked for several at a time
                moving += link.latency_s
            last_tier = stretch.tier
            saved += MARGIN * self.compute_s(stretch.num_tokens) - moving
            if saved > best:
                best, count = saved, i
        for tier in {stretch.tier for stretch in stretches[count:]}:
            self._drift(tier)
        return count

    def _drift(self, tier: str) -> None:
        link, start = self.link(tier), START.get(tier.partition(":")[0], UNKNOWN)
        rate = link.s_per_byte + DRIFT * (start.s_per_byte - link.s_per_byte)
        self._links[tier] = Link(link.latency_s, rate)


def _blended(old: float, new: float) -> float:
    return old + WEIGHT * (min(max(new, old / MAX_STEP), old * MAX_STEP) - old)
