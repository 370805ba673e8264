"""Reuse distances against their definition, the LIR clock against an exact LIRS."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_driver.kv.recency import NUM_BUCKETS, LirClock, ReuseDistance


class ExactDistance:
    """The definition: weights of the distinct groups accessed between the last two accesses of one, and since."""

    def __init__(self, weights: dict[int, int]) -> None:
        self.weights = weights
        self.history: list[int] = []

    def accessed(self, group: int) -> None:
        self.history.append(group)

    def recency(self, group: int) -> int:
        times = [i for i, g in enumerate(self.history) if g == group]
        if len(times) < 2:
            return sum(self.weights.values())
        between = set(self.history[times[-2] + 1 : times[-1]])
        since = set(self.history[times[-1] + 1 :])
        return max(sum(self.weights[g] for g in between), sum(self.weights[g] for g in since))


class ExactLirs:
    """LIRS as published (Jiang, Zhang, SIGMETRICS 2002) without the cache: which groups have LIR status.

    The stack holds groups by recency, the bottom always LIR. One seen again while in the stack, not being LIR, came
    back sooner than the bottom: it becomes LIR, and bottoms leave until the LIR groups fit. At first all are LIR that
    fit.
    """

    def __init__(self, weights: dict[int, int], lir_ratio: float) -> None:
        self.weights = weights
        self.capacity = lir_ratio * sum(weights.values())
        self.stack: OrderedDict[int, bool] = OrderedDict()  # group → is LIR; most recent last

    def accessed(self, group: int) -> None:
        was_in_stack = group in self.stack
        is_lir = self.stack.pop(group, False)
        has_room = self._lir_weight() + self.weights[group] <= self.capacity
        self.stack[group] = is_lir or was_in_stack or has_room
        if self.stack[group] and not is_lir:
            while self._lir_weight() > self.capacity:
                bottom = next(g for g, lir in self.stack.items() if lir)
                if bottom == group:
                    self.stack[group] = False
                else:
                    del self.stack[bottom]
        while any(self.stack.values()) and not next(iter(self.stack.values())):
            self.stack.popitem(last=False)

    def _lir_weight(self) -> int:
        return sum(self.weights[g] for g, lir in self.stack.items() if lir)

    def is_lir(self, group: int) -> bool:
        return self.stack.get(group, False)


def zipf(num_groups: int, length: int, rng: random.Random) -> list[int]:
    return rng.choices(range(num_groups), [1 / (i + 1) for i in range(num_groups)], k=length)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=60), st.lists(st.integers(1, 5), min_size=8, max_size=8))
def test_distances_of_few_groups_are_exact(trace: list[int], weights: list[int]) -> None:
    """Eight groups of similar size each have a bucket of their own."""
    exact, found = ExactDistance(dict(enumerate(weights))), ReuseDistance()
    for group, weight in enumerate(weights):
        found.add(group, weight)
    for group in trace:
        exact.accessed(group)
        found.accessed(group)
        for g in set(trace):
            assert abs(found.recency(g) - exact.recency(g)) <= 1 + sum(weights) // NUM_BUCKETS


@pytest.mark.parametrize("seed", range(3))
def test_distances_of_many_groups_are_within_the_buckets_width(seed: int) -> None:
    rng = random.Random(seed)
    weights = {g: rng.randint(1, 4) for g in range(300)}
    exact, found = ExactDistance(weights), ReuseDistance()
    for group, weight in weights.items():
        found.add(group, weight)
    errors = []
    for i, group in enumerate(zipf(300, 3000, rng)):
        exact.accessed(group)
        found.accessed(group)
        if i % 50 == 0 and found.recency(group) < found.total:
            errors.append(abs(found.recency(group) - exact.recency(group)) / found.total)
    assert len(errors) > 30
    assert max(errors) < 0.03, max(errors)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_weights_add_up_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    found, clock = ReuseDistance(), LirClock(0.3)
    weights: dict[int, int] = {}
    for step in range(200):
        event = rng.choice(["add", "resize", "remove", "access", "access", "access", "access"])
        group = rng.choice(list(weights)) if weights else -1
        if event == "add" or group < 0:
            weights[step] = rng.randint(0, 9)
            found.add(step, weights[step])
            clock.add(step, weights[step])
        elif event == "resize":
            weights[group] += rng.randint(0, 5)
            found.resize(group, weights[group])
            clock.resize(group, weights[group])
        elif event == "remove":
            found.remove(group)
            clock.remove(group)
            del weights[group]
        else:
            found.accessed(group)
            clock.accessed(group)
            assert clock.lir_weight <= 0.3 * sum(weights.values())
        assert found.total == sum(found._weights) == sum(weights.values())
        assert len(found._weights) <= NUM_BUCKETS
        assert clock.lir_weight == sum(w for g, w in weights.items() if clock.is_lir(g))


def traces(name: str, rng: random.Random) -> list[int]:
    if name == "loop":
        return list(range(40)) * 30
    if name == "zipf":
        return zipf(40, 3000, rng)
    if name == "hot set and scan":
        scan = iter(list(range(10, 40)) * 100)
        return [rng.randrange(10) if i % 3 else next(scan) for i in range(3000)]
    return [g for start in (0, 20) for _ in range(40) for g in range(start, start + 12)]  # a working set that moves


@pytest.mark.parametrize("name", ["loop", "zipf", "hot set and scan", "moving"])
def test_the_clock_finds_the_groups_lirs_finds(name: str) -> None:
    rng = random.Random(1)
    weights = {g: rng.randint(3, 5) for g in range(40)}
    exact, clock = ExactLirs(weights, 0.3), LirClock(0.3)
    for group, weight in weights.items():
        clock.add(group, weight)
    same = accesses = hits = exact_hits = 0
    for i, group in enumerate(traces(name, rng)):
        if i >= 200:
            accesses += 1
            hits += clock.is_lir(group)
            exact_hits += exact.is_lir(group)
            same += sum(clock.is_lir(g) == exact.is_lir(g) for g in weights)
        exact.accessed(group)
        clock.accessed(group)
    assert accesses > 500

    assert same / accesses / 40 > 0.8
    assert hits / accesses > exact_hits / accesses - 0.05


def test_the_hand_is_constant_work_on_average() -> None:
    """Steps of the hand are counted through the ring itself: each one undoes an access."""
    rng = random.Random(2)
    clock = LirClock(0.3)
    moves = 0

    class Counting(OrderedDict):  # type: ignore[type-arg]
        def move_to_end(self, *args: object, **kwargs: object) -> None:
            nonlocal moves
            moves += 1
            super().move_to_end(*args, **kwargs)  # type: ignore[arg-type]

        def __delitem__(self, key: object) -> None:
            nonlocal moves
            moves += 1
            super().__delitem__(key)

    clock._ring = Counting()
    for g in range(1000):
        clock.add(g, rng.randint(1, 9))
    for group in zipf(1000, 20_000, rng):
        clock.accessed(group)
    assert moves < 2 * 20_000
