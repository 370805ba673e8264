"""The plan of a step: its order, its budgets, and that somebody always gets on, however unwilling memory is."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_driver.config import SamplingConfig
from gllm_driver.errors import BackendError
from gllm_driver.sched.plan import SchedulerConfig, StepPlan
from gllm_driver.sched.request import Phase, Request, RunningSequence
from gllm_driver.sched.scheduler import Scheduler

PAGE = 4


class FakePages:
    """A KV manager that only counts. `moods` decides whether swapping works at the moment, refuses, or fails."""

    def __init__(self, num_pages: int, moods: random.Random | None = None) -> None:
        self.num_pages = num_pages
        self.held: dict[int, int] = {}  # pages on the device
        self.away: dict[int, int] = {}  # pages on the host
        self.reserved: dict[int, int] = {}
        self.moods = moods

    @property
    def num_free(self) -> int:
        return self.num_pages - sum(self.held.values())

    def _mood(self) -> bool:
        """Whether a copy happens; sometimes it raises."""
        mood = self.moods.random() if self.moods else 1.0
        if mood < 0.1:
            raise BackendError("injected copy failure")
        return mood > 0.4

    def open(self, seq_id: int, tokens: Sequence[int]) -> int:
        assert seq_id not in self.held
        assert seq_id not in self.away
        self.held[seq_id] = self.reserved[seq_id] = 0
        return 0

    def reserve(self, seq_id: int, num_tokens: int, running: Collection[int]) -> bool:
        more = -(-num_tokens // PAGE) - self.held[seq_id]
        if more > self.num_free:
            for other in [o for o in self.held if o not in running and o != seq_id and self.held[o]]:
                if more > self.num_free and self._mood():
                    self.away[other] = self.held.pop(other)
        if more > self.num_free:
            return False
        self.held[seq_id] += max(more, 0)
        self.reserved[seq_id] = max(self.reserved[seq_id], num_tokens)
        return True

    def bring_in(self, seq_id: int, running: Collection[int]) -> bool:
        if seq_id in self.held:
            return True
        if self.away[seq_id] > self.num_free or not self._mood():
            return False
        self.held[seq_id] = self.away.pop(seq_id)
        return True

    def is_resident(self, seq_id: int) -> bool:
        return seq_id in self.held

    def pages(self, seq_id: int) -> Sequence[int]:
        return range(self.held[seq_id])

    def num_tokens_reserved(self, seq_id: int) -> int:
        return self.reserved[seq_id]

    def touch(self, seq_ids: Sequence[int]) -> None:
        assert all(seq_id in self.held for seq_id in seq_ids)

    def idle(self, seq_ids: Sequence[int]) -> None:
        pass

    def swap_out(self, seq_id: int) -> bool:
        if not self._mood():
            return False
        self.away[seq_id] = self.held.pop(seq_id)
        return True

    def commit(self, seq_id: int, tokens: Sequence[int], num_computed: int) -> None:
        assert num_computed % PAGE == 0

    def close(self, seq_id: int) -> None:
        self.held.pop(seq_id, None)
        self.away.pop(seq_id, None)
        del self.reserved[seq_id]


class Bench:
    """A scheduler with fake pages, and what an engine would do after each plan."""

    def __init__(self, num_pages: int = 1000, moods: random.Random | None = None, **config: int | bool | None) -> None:
        self.pages = FakePages(num_pages, moods)
        self.config = SchedulerConfig(page_size=PAGE, **config)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.pages, self.config, lambda: self.pages.num_free)
        self.num = 0

    def add(self, prompt: int, max_tokens: int = 4, *, priority: int = 0, first: int | None = None) -> RunningSequence:
        tokens = [self.num if first is None else first] * prompt
        request = Request(tokens, SamplingConfig(), max_tokens, priority=priority)
        sequence = RunningSequence(self.num, request, tokens, prompt, max_tokens, 0.0)
        self.num += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        self.check(plan)
        for piece in plan.pieces:
            sequence = piece.sequence
            if piece.wants_logits:
                sequence.tokens.append(0)
            sequence.num_computed = piece.start + piece.length
            if sequence.num_output == sequence.max_output:
                self.scheduler.share(sequence)
                self.scheduler.remove(sequence)
        self.scheduler.audit()
        return plan

    def check(self, plan: StepPlan) -> None:
        """What is true of every plan."""
        pieces, config = plan.pieces, self.config
        assert len({piece.sequence.id for piece in pieces}) == len(pieces) <= config.max_batch
        assert sum(piece.length for piece in pieces) <= config.max_tokens
        decodes = [i for i, p in enumerate(pieces) if p.start >= p.sequence.prompt_length and p.length == 1]
        prompt_tokens = sum(p.length for p in pieces if p.start < p.sequence.prompt_length)
        if decodes[:1] == [0] and config.chunk_size is not None:  # not one that came back after the chunks were chosen
            assert prompt_tokens <= config.chunk_size
        for piece in pieces:
            sequence = piece.sequence
            assert piece.start == sequence.num_computed
            assert 0 < piece.length <= len(sequence.tokens) - piece.start
            assert self.pages.held[sequence.id] * PAGE >= piece.start + piece.length
            if sequence.prompt_length > 1 and piece.start < sequence.prompt_length:
                assert piece.length > 1, "a prompt token alone"
            if not config.chunk_invariant and piece.length > 1:
                assert piece.start + piece.length <= sequence.prompt_length, "outputs in a chunk"


def lengths(plan: StepPlan) -> list[tuple[int, int]]:
    return [(piece.sequence.id, piece.length) for piece in plan.pieces]


def test_decodes_come_first_and_prompts_fill_up() -> None:
    bench = Bench(chunk_size=8, idle_chunk_size=16)
    bench.add(10)
    assert lengths(bench.step()) == [(0, 10)]
    bench.add(20)
    assert lengths(bench.step()) == [(0, 1), (1, 8)]
    assert lengths(bench.step()) == [(0, 1), (1, 8)]
    assert lengths(bench.step()) == [(0, 1), (1, 4)]
    assert lengths(bench.step()) == [(1, 1)]


def test_chunks_are_larger_when_nobody_waits_for_a_token() -> None:
    bench = Bench(chunk_size=8, idle_chunk_size=64)
    bench.add(100)
    assert lengths(bench.step()) == [(0, 64)]
    assert lengths(bench.step()) == [(0, 36)]


def test_short_prompts_share_a_step() -> None:
    bench = Bench(idle_chunk_size=64)
    for length in (10, 20, 30, 40):
        bench.add(length)
    assert lengths(bench.step()) == [(0, 10), (1, 20), (2, 30), (3, 4)]


@pytest.mark.parametrize(("prompt", "chunk", "pieces"), [(9, 8, [7, 2]), (8, 8, [8]), (10, 8, [8, 2]), (5, 4, [3, 2])])
def test_no_token_of_a_prompt_is_left_alone(prompt: int, chunk: int, pieces: list[int]) -> None:
    bench = Bench(idle_chunk_size=chunk)
    bench.add(prompt)
    assert [lengths(bench.step())[0][1] for _ in pieces] == pieces


def test_higher_priority_takes_the_place_of_lower() -> None:
    bench = Bench(max_batch=2)
    low = [bench.add(4, 50) for _ in range(2)]
    bench.step()
    high = bench.add(4, 3, priority=1)
    assert {piece.sequence.id for piece in bench.step().pieces} == {0, high.id}
    assert low[1].phase is Phase.PREEMPTED
    while high.phase is not Phase.ENDED:
        bench.step()
    bench.step()
    assert low[1].phase is Phase.RUNNING


def test_the_youngest_yields_its_pages_and_comes_back() -> None:
    bench = Bench(num_pages=6, max_batch=4)
    old, young = bench.add(8, 12), bench.add(8, 12)
    while young.phase is not Phase.PREEMPTED:
        bench.step()
    assert old.phase is Phase.RUNNING
    while not bench.scheduler.is_idle:
        bench.step()
    assert old.num_output == young.num_output == 12
    assert bench.scheduler.counters.preemptions == 1
    assert bench.scheduler.counters.recomputes == 0


def test_who_begins_alike_waits_for_the_shared_beginning() -> None:
    bench = Bench(chunk_size=8, idle_chunk_size=8)
    bench.add(40, first=7)
    bench.add(40, first=7)
    bench.add(6)
    for _ in range(3):
        assert {piece.sequence.id for piece in bench.step().pieces} == {0}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 3), ("max_batch", 0), ("chunk_size", 1), ("idle_chunk_size", 2), ("page_size", 0)],
)
def test_senseless_configurations_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        SchedulerConfig(**{name: value})


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(-1, 1), st.integers(0, 60)),
        min_size=1,
        max_size=12,
    ),
    num_pages=st.integers(13, 30),
    max_batch=st.integers(1, 5),
    chunk_size=st.sampled_from([None, 4, 6, 16]),
    idle_chunk_size=st.sampled_from([4, 9, 64]),
    chunk_invariant=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_everybody_finishes_however_swapping_behaves(
    sizes: list[tuple[int, int, int, int]],
    num_pages: int,
    max_batch: int,
    chunk_size: int | None,
    idle_chunk_size: int,
    chunk_invariant: bool,
    seed: int,
) -> None:
    """Every plan computes something while anything is left: so the workload ends, and in a bounded number of steps."""
    bench = Bench(
        num_pages,
        random.Random(seed),
        max_batch=max_batch,
        chunk_size=chunk_size,
        idle_chunk_size=idle_chunk_size,
        chunk_invariant=chunk_invariant,
    )
    arrivals = sorted(sizes, key=lambda size: size[3])
    step = 0
    while arrivals or not bench.scheduler.is_idle:
        while arrivals and (arrivals[0][3] <= step or bench.scheduler.is_idle):
            prompt, output, priority, _ = arrivals.pop(0)
            bench.add(prompt, output, priority=priority)
        assert bench.step().pieces, "nothing is computed though somebody waits"
        step += 1
        assert step < 20_000
    assert bench.pages.num_free == num_pages
    assert not bench.pages.away
