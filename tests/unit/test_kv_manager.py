"""The KV manager against contents that are really copied: whatever the order of events, nothing is lost or mixed up."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from kv_world import PAGE, World

from gllm_driver.config import SwapConfig
from gllm_driver.errors import BackendError, CapacityError
from gllm_driver.kv.manager import CachedKvHandle
from gllm_driver.types import PageState

SYSTEM = list(range(100, 100 + 3 * PAGE))  # a prompt prefix many sequences have in common


EVENTS = ("open", "run", "run", "run", "run", "run", "swap out", "swap out", "drop", "close", "hold", "release")


class Player:
    """Makes events happen to a world; after each, everything is checked."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.next_id = 0
        self.handles: list[CachedKvHandle] = []

    def play(self, event: str, rng: random.Random) -> None:
        """One event, after some time; one copy in ten fails."""
        world = self.world
        ids = list(world.tokens)
        world.now += rng.choice([0.0, 0.01, 0.06, 0.2, 1.5])
        world.fail_next = int(rng.random() < 0.1)
        seq_id = rng.choice(ids) if ids else 0
        if event == "open" or not ids:
            self.open(rng)
        elif event == "run":
            run(world, seq_id, rng)
        elif event == "swap out":
            swap_out(world, seq_id)
        elif event == "drop":
            world.drop(seq_id)
        elif event == "close":
            world.close(seq_id)
        elif event == "hold" and (handle := world.kv.get_cached_kv_handle(world.tokens[seq_id])):
            self.handles.append(handle)
        elif event == "release" and self.handles:
            world.kv.release(self.handles.pop(rng.randrange(len(self.handles))))
        check_all(world)
        for handle in self.handles:
            assert tuple(world.kv.pages(handle.seq_id)) == handle.pages

    def open(self, rng: random.Random) -> None:
        shared = rng.randrange(len(SYSTEM) + 1)
        tail = rng.choices(range(3), k=rng.randint(1, 3 * PAGE))
        hit = self.world.open(self.next_id, SYSTEM[:shared] + tail)
        assert hit % PAGE == 0
        assert hit <= max(0, shared + len(tail) - 2)
        self.next_id += 1

    def finish(self) -> None:
        """Everything ends, and nothing is left over."""
        for handle in self.handles:
            self.world.kv.release(handle)
        for seq_id in list(self.world.tokens):
            self.world.close(seq_id)
        check_all(self.world)
        stats = self.world.kv.stats()
        assert stats.num_used == stats.num_swapped == 0


def run(world: World, seq_id: int, rng: random.Random) -> None:
    """Bring a sequence in if need be and compute more of it; a refusal or failure leaves it as it was."""
    others = [i for i in world.tokens if i != seq_id and rng.random() < 0.2]
    was_resident = world.kv.is_resident(seq_id)
    there = {i for i in others if world.kv.is_resident(i)}
    try:
        done = world.kv.bring_in(seq_id, others)
        assert world.kv.is_resident(seq_id) == done
    except BackendError:
        assert world.kv.is_resident(seq_id) == was_resident
        return
    if done:
        target = world.computed[seq_id] + rng.randint(1, 2 * PAGE)
        tokens = world.tokens[seq_id]
        tokens += rng.choices(range(3), k=max(0, target - len(tokens)))
        before = list(world.kv.pages(seq_id))
        try:
            done = world.compute(seq_id, target, others)
        except CapacityError:
            assert -(-target // PAGE) > world.kv.pool.num_pages
            done = False
        except BackendError:
            done = False
        if not done:
            assert list(world.kv.pages(seq_id)) == before
    assert all(world.kv.is_resident(i) for i in there), "a running sequence was moved"


def swap_out(world: World, seq_id: int) -> None:
    was_resident = world.kv.is_resident(seq_id)
    was_warm = any(
        known.state is PageState.WARM for known in world.kv.page_states().values() if known.sequence_id == seq_id
    )
    try:
        done = world.kv.swap_out(seq_id)
    except BackendError:
        done = False
    assert not (done and was_warm)
    assert world.kv.is_resident(seq_id) == (was_resident and not done)


def check_all(world: World) -> None:
    """Contents, the audit, and that every report says the same."""
    world.verify()
    kv = world.kv
    stats = kv.stats()
    assert stats.num_free + stats.num_used + stats.num_cached == stats.num_pages
    assert kv.pressure() == stats.num_used / stats.num_pages
    states = kv.page_states()
    swapped = [page for page, known in states.items() if known.state is PageState.SWAPPED]
    assert len(swapped) == stats.num_swapped
    assert all(page >= stats.num_pages for page in swapped)
    assert len(states) == stats.num_pages + stats.num_swapped


class Interleavings(RuleBasedStateMachine):
    """Any order of events on caches of any size; hypothesis looks for the shortest that breaks something."""

    @initialize(
        num_pages=st.integers(4, 20),
        num_slots=st.integers(0, 24),
        reuse=st.booleans(),
        granule=st.integers(1, 4),
        threshold=st.sampled_from([0.3, 0.85, 1.0]),
    )
    def start(self, num_pages: int, num_slots: int, reuse: bool, granule: int, threshold: float) -> None:
        config = SwapConfig(granularity_pages=granule, swap_threshold=threshold)
        self.player = Player(World(num_pages, num_slots, config, prefix_reuse=reuse))

    @rule(event=st.sampled_from(EVENTS), seed=st.integers(0, 2**16))
    def play(self, event: str, seed: int) -> None:
        self.player.play(event, random.Random(seed))

    def teardown(self) -> None:
        if hasattr(self, "player"):
            self.player.finish()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_long_interleavings_reach_everything() -> None:
    """The same with a fixed seed, long enough that every kind of event is known to have happened."""
    total: Counter[str] = Counter()
    for seed in range(12):
        rng = random.Random(seed)
        player = Player(World(6 + seed, 12, prefix_reuse=seed % 4 > 0))
        for _ in range(400):
            player.play(rng.choice(EVENTS), rng)
        player.finish()
        total.update(asdict(player.world.kv.stats().counters))
    for name in ("groups_swapped_out", "groups_swapped_in", "cached_pages_evicted", "copy_failures"):
        assert total[name] > 20, (name, total)
    assert total["prefix_tokens_hit"] > 200


def test_a_sequence_larger_than_the_cache_is_refused_with_the_figures() -> None:
    world = World(4, 4)
    world.open(1, [1, 2, 3])
    with pytest.raises(CapacityError, match="17 tokens need 5 KV pages of 4, the cache has 4"):
        world.kv.reserve(1, 17, (1,))
    world.verify()
