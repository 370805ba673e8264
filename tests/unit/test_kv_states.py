"""Page states: every row of the table, on a clock that only moves when told."""

from __future__ import annotations

import pytest
from kv_world import PAGE, World

from gllm_driver.config import SwapConfig
from gllm_driver.kv.states import GroupState
from gllm_driver.types import PageState

ACTIVE, STANDBY, SWAPPED, WARM, PROTECTED = (
    PageState.ACTIVE,
    PageState.STANDBY,
    PageState.SWAPPED,
    PageState.WARM,
    PageState.PROTECTED,
)


def warm(config: SwapConfig | None = None) -> GroupState:
    state = GroupState(config or SwapConfig())
    state.swapped_out()
    assert state.at(0.0) is SWAPPED
    state.swapped_in(0.0)
    assert state.at(0.0) is WARM
    return state


def test_active_cools_to_standby() -> None:
    state = GroupState(SwapConfig())
    state.accessed(0.0)
    assert state.at(0.0) is ACTIVE
    assert state.may_leave(0.0)
    assert not state.may_leave(0.0, must_be_idle=True)
    state.idled()
    assert state.at(0.0) is STANDBY
    assert state.may_leave(0.0, must_be_idle=True)


def test_warm_ends_when_its_time_is_up() -> None:
    state = warm()
    assert state.at(0.0999) is WARM
    assert not state.may_leave(0.0999)
    assert state.at(0.1) is ACTIVE


def test_warm_ends_after_two_accesses() -> None:
    state = warm()
    state.accessed(0.01)
    assert state.at(0.01) is WARM
    state.accessed(0.02)
    assert state.at(0.02) is ACTIVE


def test_warm_becomes_protected_when_hot() -> None:
    state = GroupState(SwapConfig())
    state.accessed(0.0)
    state.idled()
    state.swapped_out()
    state.swapped_in(0.5)
    state.accessed(0.51)
    assert state.at(0.51) is WARM
    state.accessed(0.52)
    assert state.at(0.52) is PROTECTED


def test_idle_does_not_end_warm_or_protected() -> None:
    state = warm()
    state.idled()
    assert state.at(0.05) is WARM
    for now in (0.2, 0.3, 0.4):
        state.accessed(now)
    state.idled()
    assert state.at(0.4) is PROTECTED


def test_what_idles_while_warm_has_cooled_when_that_ends() -> None:
    state = warm()
    state.accessed(0.01)
    state.idled()
    assert state.at(0.02) is WARM
    assert state.at(0.1) is STANDBY


def test_protected_ends_when_left_alone_for_the_window() -> None:
    state = GroupState(SwapConfig())
    for now in (0.0, 0.5, 1.0):
        assert state.at(now) is ACTIVE
        state.accessed(now)
    assert state.at(2.0) is PROTECTED
    assert not state.may_leave(2.0)
    assert state.at(2.001) is STANDBY
    state.accessed(2.1)
    assert state.at(2.1) is ACTIVE


def test_three_accesses_over_more_than_the_window_do_not_protect() -> None:
    state = GroupState(SwapConfig())
    for now in (0.0, 0.6, 1.2, 1.8):
        state.accessed(now)
        assert state.at(now) is ACTIVE


def test_thresholds_are_configurable() -> None:
    state = warm(SwapConfig(warmup_duration=1.0, min_warm_access=1, hot_threshold=5, working_set_window=10.0))
    state.accessed(0.5)
    assert state.at(0.5) is ACTIVE
    for now in (1.0, 2.0, 3.0):
        state.accessed(now)
    assert state.at(3.0) is ACTIVE
    state.accessed(4.0)
    assert state.at(13.9) is PROTECTED


@pytest.mark.parametrize(
    ("field", "value"),
    [("granularity_pages", 0), ("swap_threshold", 0.0), ("lir_ratio", 1.5), ("warmup_duration", float("nan"))],
)
def test_a_config_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SwapConfig(**{field: value})  # type: ignore[arg-type]


def test_host_slots_follow_from_the_reserve() -> None:
    assert SwapConfig(cpu_reserve_mb=1).num_host_slots(300_000) == 3
    assert SwapConfig(enable_swap=False).num_host_slots(1) == 0


def test_metadata_of_a_swapped_and_a_warm_sequence() -> None:
    world = World(8, 8)
    world.open(7, [1] * (2 * PAGE))
    world.now = 3.0
    assert world.compute(7, 2 * PAGE)
    assert world.kv.swap_out(7)
    on_host = [known for known in world.kv.page_states().values() if known.sequence_id == 7]
    assert [known.state for known in on_host] == [SWAPPED, SWAPPED]
    assert [known.page_id >= 8 for known in on_host] == [True, True]
    assert world.kv.bring_in(7, ())
    first, second = [world.kv.page_states()[page] for page in world.kv.pages(7)]
    assert first.state is WARM
    assert (first.swap_in_time, first.warm_until) == (3.0, 3.1)
    assert (first.access_count, first.last_access) == (1, 3.0)
    assert first.is_attention_sink
    assert not second.is_attention_sink


def test_a_shared_page_shows_its_best_protected_user_and_no_sequence() -> None:
    world = World(16, 16)
    prompt = list(range(PAGE))
    world.open(1, [*prompt, 1, 2])
    assert world.compute(1, PAGE + 2)
    assert world.open(2, [*prompt, 3, 4]) == PAGE
    for _ in range(3):
        assert world.compute(2, PAGE + 2)
    shared, own = world.kv.pages(1)
    states = world.kv.page_states()
    assert (states[shared].sequence_id, states[shared].state) == (None, PROTECTED)
    assert (states[own].sequence_id, states[own].state) == (1, STANDBY)


def test_what_is_preempted_leaves_the_working_set_first() -> None:
    group = GroupState(SwapConfig())
    for now in (0.0, 0.1, 0.2):
        group.accessed(now)
    assert group.at(0.2) is PageState.PROTECTED
    group.preempted()
    assert group.at(0.2) is PageState.STANDBY
    group.swapped_in(0.3)
    group.preempted()
    assert group.at(0.3) is PageState.WARM
