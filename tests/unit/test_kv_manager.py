"""The KV manager against contents that are really copied: whatever the order of events, nothing is lost or mixed up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_world import PAGE, World

from gllm_driver.config import SwapConfig
from gllm_driver.errors import BackendError, CapacityError
from gllm_driver.types import PageState

SYSTEM = list(range(100, 100 + 3 * PAGE))  # a prompt prefix many sequences have in common


class Interleavings(RuleBasedStateMachine):
    """Sequences are opened, computed, swapped, dropped, closed in any order; copies fail now and then."""

    @initialize(pages=st.integers(4, 24), slots=st.integers(0, 24), reuse=st.booleans(), granule=st.integers(1, 4))
    def start(self, pages: int, slots: int, reuse: bool, granule: int) -> None:
        self.world = World(pages, slots, SwapConfig(granularity_pages=granule), prefix_reuse=reuse)
        self.next_id = 0
        self.handles: list[Any] = []

    def pick(self, number: int) -> int:
        ids = sorted(self.world.tokens)
        return ids[number % len(ids)]

    @rule(shared=st.integers(0, len(SYSTEM)), tail=st.lists(st.integers(0, 2), min_size=1, max_size=12))
    def open(self, shared: int, tail: list[int]) -> None:
        hit = self.world.open(self.next_id, SYSTEM[:shared] + tail)
        assert hit % PAGE == 0
        assert hit <= max(0, shared + len(tail) - 2)
        self.next_id += 1

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99), more=st.integers(1, 9))
    def compute(self, number: int, more: int) -> None:
        world, seq_id = self.world, self.pick(number)
        if not world.kv.is_resident(seq_id):
            return
        target = world.computed[seq_id] + more
        tokens = world.tokens[seq_id]
        tokens += [(seq_id + i) % 3 for i in range(len(tokens), target)]
        before = list(world.kv.pages(seq_id))
        failing = world.fail_next
        try:
            done = world.compute(seq_id, target)
        except CapacityError:
            assert -(-target // PAGE) > world.kv.pool.num_pages
            done = False
        except BackendError:
            assert world.fail_next < failing
            done = False
        if not done:
            assert list(world.kv.pages(seq_id)) == before

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99))
    def bring_in(self, number: int) -> None:
        world, seq_id = self.world, self.pick(number)
        was_resident = world.kv.is_resident(seq_id)
        try:
            done = world.kv.bring_in(seq_id, ())
        except BackendError:
            done = False
        assert world.kv.is_resident(seq_id) == (done or was_resident)

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99))
    def swap_out(self, number: int) -> None:
        world, seq_id = self.world, self.pick(number)
        was_resident = world.kv.is_resident(seq_id)
        try:
            done = world.kv.swap_out(seq_id)
        except BackendError:
            done = False
        assert world.kv.is_resident(seq_id) == (was_resident and not done)

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99))
    def drop(self, number: int) -> None:
        self.world.drop(self.pick(number))

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99))
    def close(self, number: int) -> None:
        self.world.close(self.pick(number))

    @precondition(lambda self: self.world.tokens)
    @rule(number=st.integers(0, 99))
    def hold(self, number: int) -> None:
        handle = self.world.kv.get_cached_kv_handle(self.world.tokens[self.pick(number)])
        if handle is not None:
            self.handles.append(handle)

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        self.world.kv.release(self.handles.pop(number % len(self.handles)))

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.2, 1.5]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(count=st.integers(1, 2))
    def fail(self, count: int) -> None:
        self.world.fail_next = count

    @invariant()
    def nothing_is_lost(self) -> None:
        world = self.world
        world.verify()
        stats = world.kv.stats()
        assert stats.num_free + stats.num_used + stats.num_cached == stats.num_pages
        assert world.kv.pressure() == stats.num_used / stats.num_pages
        states = world.kv.page_states()
        swapped = [page for page, known in states.items() if known.state is PageState.SWAPPED]
        assert len(swapped) == stats.num_swapped
        assert all(page >= stats.num_pages for page in swapped)
        for handle in self.handles:
            assert tuple(world.kv.pages(handle.seq_id)) == handle.pages

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for handle in self.handles:
            self.world.kv.release(handle)
        for seq_id in list(self.world.tokens):
            self.world.close(seq_id)
        self.world.kv.audit()
        stats = self.world.kv.stats()
        assert stats.num_used == stats.num_swapped == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_a_sequence_larger_than_the_cache_is_refused_with_the_figures() -> None:
    world = World(4, 4)
    world.open(1, [1, 2, 3])
    with pytest.raises(CapacityError, match="17 tokens need 5 KV pages of 4, the cache has 4"):
        world.kv.reserve(1, 17, (1,))
    world.verify()
