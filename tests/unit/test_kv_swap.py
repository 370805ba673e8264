"""Which groups leave: whole, coldest first, no more than needed, and never those that must stay."""

from __future__ import annotations

import random
from functools import partial
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_world import PAGE, World

from gllm_driver.config import SwapConfig
from gllm_driver.errors import BackendError
from gllm_driver.kv.swap import FREQUENCY_WEIGHT, Candidate, Hgal, fewest_groups
from gllm_driver.types import PageState


def world_of(num_sequences: int, pages_each: int = 2, *, num_pages: int = 8, **kwargs: int) -> World:
    """Sequences 0, 1, … of the same length and different tokens, each computed once, a second apart."""
    world = World(num_pages, 64, SwapConfig(swap_threshold=1.0, granularity_pages=1, **kwargs), prefix_reuse=False)
    for seq_id in range(num_sequences):
        world.open(seq_id, [seq_id] * (pages_each * PAGE))
        assert world.compute(seq_id, pages_each * PAGE)
        world.now += 1.0
    return world


def resident(world: World) -> list[int]:
    return [seq_id for seq_id in world.tokens if world.kv.is_resident(seq_id)]


def freed_by(chosen: list[Candidate], holders: dict[int, int]) -> int:
    pages = [page for candidate in chosen for page in candidate.pages]
    return sum(pages.count(page) == holders[page] for page in set(pages))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 20))
def test_chosen_groups_are_enough_none_of_them_spare_and_fit_the_host(seed: int, wanted: int, slots: int) -> None:
    rng = random.Random(seed)
    ranked = [
        Candidate(
            g, sorted({10 * g + i for i in range(rng.randint(0, 4))} | set(rng.sample(range(900, 904), k=2))), 0, 0.0
        )
        for g in range(rng.randint(0, 6))
    ]
    holders = {page: rng.randint(0, 1) for candidate in ranked for page in candidate.pages}  # others on the device
    for candidate in ranked:
        for page in candidate.pages:
            holders[page] += 1
    copied = {page for page in holders if rng.random() < 0.2}
    chosen, freed = fewest_groups(
        ranked, wanted, holders=lambda p: holders[p], needs_slot=lambda p: p not in copied, free_slots=slots
    )
    assert freed == freed_by(chosen, holders)
    needed = {page for candidate in chosen for page in candidate.pages} - copied
    assert len(needed) <= slots
    for spare in chosen:
        rest = [candidate for candidate in chosen if candidate is not spare]
        assert freed_by(rest, holders) < min(freed, wanted), "a group too many"
    if slots == 20 and freed < wanted and len({p for c in ranked for p in c.pages}) <= slots:
        best = max((freed_by(list(c), holders) for n in range(7) for c in combinations(ranked, n)), default=0)
        assert freed == best


def test_the_score_is_the_formula() -> None:
    policy = Hgal(SwapConfig())
    for group, weight in ((1, 3), (2, 5)):
        policy.added(group, weight)
        policy.accessed(group)
    policy.accessed(1)
    once = policy.score(Candidate(2, [0] * 5, 1, 4.0), 10.0)
    twice = policy.score(Candidate(1, [0] * 3, 2, 9.0), 10.0)
    assert once == 6000.0 + 5 * 8 - FREQUENCY_WEIGHT  # accessed once: all 8 pages count
    assert twice == 1000.0 + 3 * 5 - 2 * FREQUENCY_WEIGHT


def test_lir_groups_and_those_just_swapped_in_come_last() -> None:
    policy = Hgal(SwapConfig(lir_ratio=0.5))
    for group, weight in ((1, 40), (2, 1), (3, 1), (4, 40)):
        policy.added(group, weight)
    for group in (1, 1, 2, 3, 4, 1, 2):
        policy.accessed(group)
    assert [policy.is_lir(group) for group in (1, 2, 3, 4)] == [True, True, False, False]
    large = Candidate(1, list(range(40)), 3, 9.0)
    small = Candidate(2, [50], 2, 10.0)
    cold = Candidate(3, [60], 1, 10.0)
    fresh = Candidate(4, list(range(70, 110)), 1, 10.0, swap_in_time=9.95)
    assert policy.score(fresh, 10.0) > policy.score(large, 10.0) > policy.score(cold, 10.0)
    assert policy.ranked([small, large, cold, fresh], 10.0) == [cold, large, small, fresh]
    assert policy.ranked([small, large, cold, fresh], 10.06) == [fresh, cold, large, small]


def test_a_sequence_leaves_whole() -> None:
    world = world_of(4)
    world.open(9, [9])
    assert world.kv.reserve(9, 1, (9,))
    assert len(resident(world)) == 4
    assert world.kv.stats().num_swapped == 2
    world.verify()


def test_one_large_group_goes_instead_of_several() -> None:
    """The colder small group is put back when the large one that follows suffices."""
    world = world_of(1, 1, num_pages=7)
    world.open(5, [5] * (6 * PAGE))
    assert world.compute(5, 6 * PAGE)
    world.now += 5.0
    world.open(9, [9] * (4 * PAGE))
    assert world.compute(9, 4 * PAGE)
    assert resident(world) == [0, 9]


def test_running_pinned_warm_and_protected_stay() -> None:
    world = world_of(4)
    for _ in range(3):
        world.kv.touch([0])
    world.kv.idle([0])
    world.kv.pin(1)
    assert world.kv.swap_out(2)
    assert world.kv.bring_in(2, ())
    states = {seq_id: world.kv.page_states()[world.kv.pages(seq_id)[0]].state for seq_id in range(4)}
    assert states == {0: PageState.PROTECTED, 1: PageState.STANDBY, 2: PageState.WARM, 3: PageState.STANDBY}
    world.open(9, [9])
    assert not world.kv.reserve(9, 1, (3,))
    assert resident(world) == [0, 1, 2, 3, 9]
    assert not world.kv.swap_out(2)
    assert not world.kv.swap_out(1)
    world.now += 0.1
    assert world.kv.reserve(9, 1, (3,)), "2 is no longer warm"
    assert resident(world) == [0, 1, 3, 9]


def test_a_scan_does_not_push_out_what_is_used_again_and_again() -> None:
    world = world_of(0, num_pages=10)
    for seq_id in (0, 1):
        world.open(seq_id, [seq_id] * (2 * PAGE))
    for seq_id in range(2, 30):
        for hot in (0, 1):
            assert world.kv.is_resident(hot)
            assert world.compute(hot, 2 * PAGE)
        world.now += 3.0  # longer than any protection
        world.open(seq_id, [seq_id] * (2 * PAGE))
        assert world.compute(seq_id, 2 * PAGE)
    world.verify()
    assert {0, 1} <= set(resident(world))


def test_the_host_budget_is_respected() -> None:
    world = World(8, 3, SwapConfig(granularity_pages=1))
    for seq_id in range(4):
        world.open(seq_id, [seq_id] * (2 * PAGE))
        assert world.compute(seq_id, 2 * PAGE)
        world.now += 2.0
    world.open(9, [9] * (3 * PAGE))
    assert not world.compute(9, 3 * PAGE)
    assert world.compute(9, 2 * PAGE)
    assert world.kv.stats().num_swapped == 2
    assert not world.kv.swap_out(1)
    world.verify()


def test_above_the_threshold_idle_sequences_leave_before_room_is_short() -> None:
    world = World(10, 10, SwapConfig(swap_threshold=0.5, granularity_pages=2), prefix_reuse=False)
    for seq_id in range(3):
        world.open(seq_id, [seq_id] * (2 * PAGE))
        assert world.compute(seq_id, 2 * PAGE)
        world.now += 2.0
    assert world.kv.pressure() <= 0.5
    assert world.kv.stats().counters.groups_swapped_out == 1
    world.fail_next = 1  # a copy that was not needed fails without anybody's request failing
    world.open(3, [3] * (2 * PAGE))
    assert world.compute(3, 2 * PAGE)
    assert world.kv.stats().counters.copy_failures == 1
    world.verify()


def test_swapping_can_be_off() -> None:
    world = World(4, 4, SwapConfig(enable_swap=False))
    world.open(1, [1] * (3 * PAGE))
    assert world.compute(1, 3 * PAGE)
    world.now += 9.0
    world.open(2, [2] * (2 * PAGE))
    assert not world.compute(2, 2 * PAGE)
    assert not world.kv.swap_out(1)


def test_shared_pages_are_copied_once_and_stay_for_those_who_use_them() -> None:
    world = World(12, 12)
    system = list(range(3 * PAGE))
    for seq_id in (1, 2, 3):
        world.open(seq_id, [*system, seq_id, seq_id])
        assert world.compute(seq_id, 3 * PAGE + 2)
    shared = world.kv.pages(3)[:3]
    assert world.kv.swap_out(1)
    assert world.kv.swap_out(2)
    assert world.copies == [("out", 4), ("out", 1)]
    assert world.kv.pages(3)[:3] == shared
    assert world.kv.stats().num_used == 4
    assert world.kv.bring_in(1, ())
    assert world.copies[-1] == ("in", 1)
    assert world.kv.pages(1)[:3] == shared
    world.verify()
    world.close(3)
    world.close(1)
    world.now += 1.0
    world.open(4, [44] * (12 * PAGE))
    assert world.compute(4, 12 * PAGE)  # takes every page of the device
    world.close(4)
    world.open(5, [55] * (8 * PAGE))
    assert world.compute(5, 8 * PAGE)
    assert world.kv.bring_in(2, ())
    assert world.copies[-1] == ("in", 4)
    world.verify()


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_failed_copy_changes_nothing(way: str) -> None:
    world = world_of(4)
    world.open(9, [9])
    if way == "in":
        assert world.kv.swap_out(0)
    before = world.kv.page_states()
    free = world.kv.pool.num_free
    world.fail_next = 1
    move = partial(world.kv.bring_in, 0, ()) if way == "in" else partial(world.kv.reserve, 9, 1, ())
    with pytest.raises(BackendError, match=f"swap-{way} of 2 pages failed"):
        move()
    assert world.kv.page_states() == before
    assert world.kv.pool.num_free == free
    world.verify()
    assert world.kv.stats().counters.copy_failures == 1
    assert world.kv.bring_in(0, ())


def test_figures_count_thrash_and_the_working_set() -> None:
    world = world_of(2)
    assert world.kv.swap_out(0)
    assert world.kv.bring_in(0, ())
    assert world.compute(0, 2 * PAGE)
    assert world.compute(0, 2 * PAGE)
    assert world.kv.swap_out(0)
    stats = world.kv.stats()
    assert stats.counters.num_thrashed == 1
    assert stats.thrash_rate == 0.5
    assert world.kv.bring_in(0, ())
    world.now += 0.5
    assert world.compute(0, 2 * PAGE)
    assert stats.counters.working_set_accesses == 1
    stats = world.kv.stats()
    assert (stats.counters.working_set_accesses, stats.counters.working_set_hits) == (2, 1)
    assert stats.working_set_hit_rate == 0.5
