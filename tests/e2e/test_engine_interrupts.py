"""Ctrl-C at any line of the engine: what goes on afterwards is complete, unmixed, and leaks nothing."""

from __future__ import annotations

import gc
import random
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
from fake_backend import FakeBackend
from test_engine_interleavings import alone, engine_of
from test_engine_store import sharing

from gllm_driver.config import SamplingConfig
from gllm_driver.engine import Engine, Request, RequestHandle
from gllm_driver.kv.store import MemoryStore

# Not engine/engine.py: a trace function can raise between a `with` block and the lock's release, a signal cannot.
# Nor engine/sharing/workers.py and kv/store/, for the same reason.
OURS = (
    "/engine/core.py",
    "/engine/outcomes.py",
    "/engine/runner.py",
    *(f"/engine/sharing/{file}.py" for file in ("sharing", "fetch", "save", "known")),
    "/gllm_driver/sched/",
    *(
        f"/gllm_driver/kv/{file}.py"
        for file in ("manager", "room", "book", "adopt", "pages", "prefix", "recency", "states", "swap")
    ),
    "fake_backend.py",
)
REQUESTS = [
    Request([7] * 9, SamplingConfig(temperature=1, seed=1), 12),
    Request([7] * 9 + [3, 4, 5], SamplingConfig(temperature=1, seed=2, presence_penalty=0.5), 14),
    Request(list(range(17)), SamplingConfig(temperature=1, seed=3), 13, priority=1),
    Request([5], SamplingConfig(temperature=1, seed=4), 16, flow="a"),
]


class Interrupter:
    """Raises KeyboardInterrupt when the n-th line of our code is about to run, as a signal handler would."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> Any:
        return self if any(part in frame.f_code.co_filename for part in OURS) and self._passes(event) else None

    def _passes(self, event: str) -> bool:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return True


def workload(engine: Engine) -> list[RequestHandle]:
    handles = [engine.submit(request) for request in REQUESTS]
    for _ in range(5):
        next(handles[0])
    handles[3].cancel()
    return handles


def read(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.result()


def engine(*, chunky: bool, store: MemoryStore | None = None) -> Engine:
    shared = None if store is None else sharing(store, chunk_tokens=4, min_tail_tokens=4, min_wait_s=0.05)
    backend = FakeBackend(chunky=chunky)
    return engine_of(backend, 12, slots=16, max_batch=3, chunk_size=5, idle_chunk_size=7, sharing=shared)


@pytest.mark.parametrize("has_store", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_an_interrupt_anywhere_loses_nothing(seed: int, has_store: bool) -> None:
    rng = random.Random(seed)
    chunky = bool(seed % 2)
    store = MemoryStore(4000) if has_store else None
    expected = [alone(request, chunky=chunky)[0] for request in REQUESTS]
    counter = Interrupter(10**9)
    whole = engine(chunky=chunky, store=store)
    handles = workload(whole)
    sys.settrace(counter)
    read(handles)
    sys.settrace(None)
    whole.close()
    num_lines = 10**9 - counter.left
    assert num_lines > 3000
    for _ in range(30):
        subject = engine(chunky=chunky, store=store)
        handles = workload(subject)
        for _ in range(rng.randint(1, 3)):  # an interrupt may hit the recovery from another
            sys.settrace(Interrupter(rng.randint(1, num_lines)))
            try:
                read(handles)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
        read(handles)
        assert subject.step() is False
        subject.audit()
        for i in range(3):
            assert handles[i].tokens == expected[i]
        assert handles[3].finish_reason == "cancelled"
        assert handles[3].tokens == expected[3][: len(handles[3].tokens)]
        assert subject.manager.stats().num_used == 0
        assert not subject._stepping.locked()
        subject.close()


@pytest.mark.parametrize("seed", range(3))
def test_an_interrupt_while_pages_are_borrowed_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    expected = [alone(request, chunky=False)[0] for request in REQUESTS[:3]]
    for _ in range(150):
        subject = engine(chunky=False)
        handles = [subject.submit(request) for request in REQUESTS[:3]]
        for _ in range(5):
            next(handles[0])
        sys.settrace(Interrupter(rng.randint(1, 500)))
        try:
            with suppress(KeyboardInterrupt):
                subject.logits([1] * 40)
        finally:
            sys.settrace(None)
        read(handles)
        assert [handle.tokens for handle in handles] == expected
        assert subject.step() is False
        subject.audit()
        assert subject.manager.stats().num_used == 0


def test_an_interrupt_after_the_last_token_does_not_make_an_observer_forget_its_answer() -> None:
    told: list[int] = []

    def on_token(token: int) -> bool:
        told.append(token)
        return len(told) == 3

    whole = alone(REQUESTS[0], chunky=False)[0]
    for at in range(1, 1200):
        told.clear()
        subject = engine(chunky=False)
        handle = subject.submit(replace(REQUESTS[0], on_token=on_token))
        sys.settrace(Interrupter(at))
        try:
            with suppress(KeyboardInterrupt):
                handle.result()
        finally:
            sys.settrace(None)
        assert handle.result() == whole[:3], at
        assert told == whole[:3], at
        assert handle.finish_reason == "stop", at


@pytest.mark.parametrize("num_pages", [4, 12])
def test_an_interrupt_after_the_first_token_of_a_prompt_that_fills_its_pages(num_pages: int) -> None:
    """The chunk that is computed again is one token longer than the pages it had."""
    wants = [replace(request, tokens=[7] * 12, max_tokens=4) for request in REQUESTS[:2]]
    subject = engine_of(FakeBackend(), num_pages, max_batch=3, chunk_size=12, idle_chunk_size=12)
    handles = [subject.submit(want) for want in wants]
    for handle in handles:
        handle.listen(Mock(side_effect=[KeyboardInterrupt, *[None] * 10]))
        with pytest.raises(KeyboardInterrupt):
            handle.result()
    assert [handle.result() for handle in handles] == [alone(want, chunky=False)[0] for want in wants]
    subject.audit()
    subject.close()


def test_real_signals_leave_no_lock_and_no_gap() -> None:
    """A timer's signals, wherever they strike: in the engine, between two `with` lines, while waiting."""

    def strike(_signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    rng = random.Random(5)
    expected = [alone(request, chunky=False)[0] for request in REQUESTS[:3]]
    struck = 0
    before = signal.signal(signal.SIGALRM, strike)
    gc.disable()  # what strikes in a callback of the collector is reported, not raised
    try:
        for _ in range(150):
            subject = engine(chunky=False)
            handles = [subject.submit(request) for request in REQUESTS[:3]]
            for _ in range(3):
                with suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 1e-3))
                    read(handles)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    continue
                struck += 1
            read(handles)
            assert [handle.tokens for handle in handles] == expected
            assert subject.step() is False  # puts the books right if the last interrupt struck after the last token
            subject.audit()
            assert not subject._stepping.locked()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert struck > 100
