"""Sequences that make room by merging: fewer pages, the right contents, and nobody else ever meets them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from kv_world import PAGE, World

from gllm_driver.config import DistillConfig
from gllm_driver.errors import BackendError

TOKENS = list(range(10 * PAGE))


class FirstOfWindow:
    """Merges windows into their first token, so that it shows which tokens an entry stands for."""

    def __init__(self, ratio: int) -> None:
        self.config = DistillConfig(ratio, sinks=1, window=PAGE)
        self.world: World
        self.fails = ""

    def num_computed(self, seq_id: int) -> int:
        return self.world.computed[seq_id]

    def read(self, pages: Sequence[int]) -> np.ndarray:
        self._fail("read")
        return self.world.device[list(pages)].reshape(-1, PAGE, self.config.ratio)[..., 0].copy()

    def write(self, merged: np.ndarray, pages: Sequence[int]) -> None:
        self._fail("write")
        self.world.device[list(pages)] = merged

    def _fail(self, step: str) -> None:
        if self.fails == step:
            raise BackendError(f"{step}: injected")


def world_of(num_pages: int, ratio: int, num_slots: int = 32) -> tuple[World, FirstOfWindow]:
    merger = FirstOfWindow(ratio)
    merger.world = World(num_pages, num_slots, merger=merger)
    return merger.world, merger


def idle_world(num_pages: int, ratio: int, num_slots: int = 32) -> tuple[World, FirstOfWindow]:
    """The same with sequence 1 of TOKENS, computed and idle for so long that it may leave."""
    world, merger = world_of(num_pages, ratio, num_slots)
    world.open(1, TOKENS)
    world.compute(1, len(TOKENS))
    world.now += 5
    return world, merger


def contents(world: World, seq_id: int) -> list[int]:
    return world.device[list(world.kv.pages(seq_id))].reshape(-1).tolist()


def expected(world: World, seq_id: int, ratio: int) -> list[int]:
    """Page 0 (sinks) and the last are exact, of those between as many windows as fit are merged."""
    values = [world.value(seq_id, i) for i in range(len(world.tokens[seq_id]))]
    size = ratio * PAGE
    for start in range(PAGE, len(values) - PAGE - size + 1, size):
        values[start : start + size] = values[start : start + size : ratio] * ratio
    return values


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_sequence_goes_on_with_fewer_pages(ratio: int) -> None:
    world, _ = world_of(16, ratio)
    world.open(1, [*TOKENS, *TOKENS[: 2 * PAGE]])
    world.compute(1, len(TOKENS))
    world.tokens[1] = TOKENS
    world.now += 5
    assert world.kv.is_exact(1)
    assert world.kv.swap_out(1)
    assert world.kv.is_resident(1)
    assert not world.kv.is_exact(1)
    world.kv.audit()
    assert len(world.kv.pages(1)) == 10
    assert len(set(world.kv.pages(1))) == 10 - 8 + 8 // ratio
    assert contents(world, 1) == expected(world, 1, ratio)
    world.tokens[1] = [*TOKENS, *TOKENS[: 2 * PAGE]]
    assert world.compute(1, 12 * PAGE)  # at the same positions as ever
    assert contents(world, 1)[10 * PAGE :] == [world.value(1, i) for i in range(10 * PAGE, 12 * PAGE)]
    world.kv.audit()


def test_merged_pages_leave_and_come_back() -> None:
    world, _ = idle_world(16, 4)
    assert world.kv.swap_out(1)
    assert world.kv.swap_out(1)  # nothing is left to merge: now it goes
    assert not world.kv.is_resident(1)
    assert world.copies == [("out", 4)]
    world.kv.audit()
    assert world.kv.bring_in(1, ())
    assert contents(world, 1) == expected(world, 1, 4)
    world.kv.audit()


def test_pressure_merges_before_it_swaps() -> None:
    world, _ = idle_world(12, 4)
    world.open(2, [-token - 1 for token in TOKENS])
    assert world.compute(2, 4 * PAGE)
    assert world.kv.is_resident(1)
    assert not world.copies
    assert contents(world, 1) == expected(world, 1, 4)
    world.kv.audit()


def test_others_find_exact_pages_or_none() -> None:
    world, _ = idle_world(32, 2)
    assert world.kv.swap_out(1)
    found = world.open(2, TOKENS)
    pages = world.kv.pages(2)
    values = [int(world.device[pages[i // PAGE], i % PAGE]) for i in range(found)]
    assert values == [world.value(2, i) for i in range(found)]
    world.kv.audit()


def test_shared_pages_stay_as_they_are() -> None:
    world, _ = world_of(32, 2)
    for seq_id in (1, 2):
        world.open(seq_id, TOKENS)
        world.compute(seq_id, len(TOKENS))
    shared = set(world.kv.pages(1)) & set(world.kv.pages(2))
    assert len(shared) == 9
    world.now += 5
    world.kv.swap_out(1)
    assert contents(world, 2) == [world.value(2, i) for i in range(len(TOKENS))]
    world.kv.audit()


def test_a_read_that_fails_changes_nothing() -> None:
    world, merger = idle_world(16, 2)
    merger.fails = "read"
    with pytest.raises(BackendError, match="injected"):
        world.kv.swap_out(1)
    world.verify()


def test_after_a_write_that_fails_the_sequence_is_computed_again() -> None:
    world, merger = idle_world(16, 2)
    merger.fails = "write"
    with pytest.raises(BackendError, match="injected"):
        world.kv.swap_out(1)
    world.kv.audit()
    assert not world.kv.is_resident(1)
    with pytest.raises(BackendError, match="was lost"):
        world.kv.bring_in(1, ())
    world.drop(1)
    assert world.kv.is_exact(1)
    assert world.compute(1, len(TOKENS))
    world.verify()
