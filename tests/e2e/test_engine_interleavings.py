"""Any order of submissions, steps, cancellations, faults and memory shortage: each output is what it is alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from fake_backend import VOCAB, WEIGHTS_HANDLE, FakeBackend, broken
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gllm_driver.config import KvCacheConfig, SamplingConfig, SwapConfig
from gllm_driver.engine import Engine, EngineConfig, Request, RequestHandle
from gllm_driver.engine.sharing import KvSharingConfig
from gllm_driver.errors import CapacityError, GllmError
from gllm_driver.sched.plan import SchedulerConfig

PAGE_SIZE = 4
CONTEXT = 64
STEPS_TO_END = 4000  # more than any of these workloads needs, if it does not hang


def engine_of(
    backend: FakeBackend,
    num_pages: int,
    *,
    slots: int = 64,
    prefix_reuse: bool = True,
    sharing: KvSharingConfig | None = None,
    **scheduler: int,
) -> Engine:
    kv = KvCacheConfig(num_pages, 1, 1, 1, PAGE_SIZE, "f32")
    swap = SwapConfig(enable_swap=slots > 0)
    config = SchedulerConfig(page_size=PAGE_SIZE, chunk_invariant=not backend.chunky, **scheduler)
    whole = EngineConfig(config, swap, prefix_reuse, sharing)
    engine = Engine(backend, WEIGHTS_HANDLE, kv, CONTEXT, whole)  # type: ignore[arg-type]
    if slots:
        engine._core.swapper.num_slots = slots
        engine._core.open_books()
    return engine


def alone(request: Request, *, chunky: bool, nan_tokens: Sequence[int] = ()) -> tuple[list[int], str | None]:
    """Tokens and end of a request with nobody beside it, in one chunk, with memory enough and nothing reused."""
    backend = FakeBackend(chunky=chunky)
    backend.nan_tokens = set(nan_tokens)
    engine = engine_of(backend, CONTEXT // PAGE_SIZE, prefix_reuse=False, idle_chunk_size=4096)
    handle = engine.submit(replace(request, deadline_s=None, on_token=None))
    with suppress(GllmError):
        handle.result()
    return handle.tokens, handle.finish_reason


requests = st.builds(
    Request,
    # few different tokens and lengths: prompts often begin alike
    tokens=st.one_of(
        st.lists(st.integers(0, 2), min_size=1, max_size=30),
        st.integers(1, 40).map(lambda n: [7] * n),
        st.integers(1, 40).map(lambda n: list(range(n))),
    ),
    sampling=st.builds(
        SamplingConfig,
        temperature=st.just(1.0),
        seed=st.integers(0, 3),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    ),
    max_tokens=st.integers(1, 24),
    eos_token_ids=st.sampled_from([frozenset(), frozenset(range(0, VOCAB, 12))]),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    flow=st.sampled_from(["", "a", "b"]),
)


class Interleavings(RuleBasedStateMachine):
    """The machine keeps what each request must yield, and compares when it ends."""

    sharing: KvSharingConfig | None = None

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.expected: dict[int, tuple[list[int], str | None]] = {}
        self.handles: list[RequestHandle] = []
        self.requests: list[Request] = []
        self.cancelled: set[int] = set()
        self.loop_failed = False

    @initialize(
        num_pages=st.integers(6, 24),
        slots=st.sampled_from([0, 3, 20, 64]),
        chunky=st.booleans(),
        max_batch=st.integers(1, 6),
        chunk_size=st.sampled_from([4, 5, 8, 64]),
        idle_chunk_size=st.sampled_from([4, 7, 64]),
        max_loop_rows=st.sampled_from([None, 1]),
        prefix_reuse=st.booleans(),
    )
    def load(
        self,
        num_pages: int,
        slots: int,
        chunky: bool,
        max_batch: int,
        chunk_size: int,
        idle_chunk_size: int,
        max_loop_rows: int | None,
        prefix_reuse: bool,
    ) -> None:
        self.backend = FakeBackend(chunky=chunky, max_loop_rows=max_loop_rows, fault=self._fault)
        self.backend.nan_tokens = {11}
        self.num_pages = num_pages
        self.engine = engine_of(
            self.backend,
            num_pages,
            slots=slots,
            prefix_reuse=prefix_reuse,
            sharing=self.sharing if prefix_reuse else None,
            max_batch=max_batch,
            chunk_size=chunk_size,
            idle_chunk_size=idle_chunk_size,
        )

    def _fault(self, call: str) -> None:
        if call in self.faults:
            self.loop_failed |= call in ("start_decode", "step")
            raise broken(call)

    @rule(request=requests)
    def submit(self, request: Request) -> None:
        total = len(request.tokens) + min(request.max_tokens, CONTEXT - len(request.tokens)) - 1
        if -(-total // PAGE_SIZE) > self.num_pages:
            with pytest.raises(CapacityError):
                self.engine.submit(request)
        else:
            self.handles.append(self.engine.submit(request))
            self.requests.append(request)

    @rule(count=st.integers(1, 30))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.before_step()
            self.engine.step()
            self.engine.audit()

    def before_step(self) -> None:
        """Whatever else goes on meanwhile."""

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.handles) - 1))
        if not self.handles[i].done:
            self.cancelled.add(i)
        self.handles[i].cancel()
        assert self.handles[i].done

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        handle = self.handles[data.draw(st.integers(0, len(self.handles) - 1))]
        try:
            next(handle, None)
        except GllmError:
            assert handle.finish_reason == "error"

    @rule(call=st.sampled_from(["swap_out_pages", "swap_in_pages", "alloc_swap_space", "start_decode", "step"]))
    def break_something(self, call: str) -> None:
        """Copies fail: that delays requests and ends none, for there is another way. Or loops: that ends one that runs
        alone."""
        self.faults = {call}

    @rule()
    def mend(self) -> None:
        self.faults = set()

    @rule(tokens=st.lists(st.integers(0, 9), min_size=1, max_size=20))
    def look_at_logits(self, tokens: list[int]) -> None:
        assert self.engine.logits(tokens).shape == (len(tokens), VOCAB)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.audit()
            for i, (handle, request) in enumerate(zip(self.handles, self.requests, strict=True)):
                if handle.done and i not in self.expected:
                    self.expected[i] = alone(request, chunky=self.backend.chunky, nan_tokens=(11,))
                    self._compare(i)

    def _compare(self, i: int) -> None:
        handle, tokens = self.handles[i], self.handles[i].tokens
        expected, reason = self.expected[i]
        if i in self.cancelled or (handle.finish_reason == "error" and self.loop_failed):
            assert tokens == expected[: len(tokens)]
        else:
            assert (tokens, handle.finish_reason) == (expected, reason)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.faults = set()
        for _ in range(STEPS_TO_END):
            self.before_step()
            if not self.engine.step():
                break
        else:
            raise AssertionError("requests are still not done: the engine hangs")
        self.books_agree()
        assert all(handle.done for handle in self.handles)
        assert self.engine.manager.stats().num_used == self.engine.manager.stats().num_swapped == 0
        assert self.backend.open_loops == 0


def test_interleavings() -> None:
    examples = int(os.environ.get("GLLM_INTERLEAVINGS", "300"))
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
        ),
    )
