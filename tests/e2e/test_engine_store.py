"""KV shared through a store, on a backend without a model: whatever the store does, each output is what it is alone."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from fake_backend import FakeBackend, broken
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from test_engine_interleavings import PAGE_SIZE, Interleavings, alone, engine_of

from gllm_driver.config import SamplingConfig
from gllm_driver.engine import Engine, Request
from gllm_driver.engine.sharing import KvSharingConfig
from gllm_driver.engine.sharing import config as sharing_config
from gllm_driver.engine.sharing import fetch as sharing_fetch
from gllm_driver.engine.sharing.workers import Worker
from gllm_driver.errors import StoreError
from gllm_driver.kv.store import KvChunkKey, KvEntry, KvLayout, KvRoot, MemoryStore

LAYOUT = KvLayout("f32", 1, 1, PAGE_SIZE, 1)
ROOT = KvRoot.of(LAYOUT, weights=bytes(32), weight_dtypes={}, context=0)
CHUNK = 2 * PAGE_SIZE
MOODS = ("raises", "os error", "bug", "late", "lies", "swaps", "others", "short", "more", "forgets")


def sharing(store: MemoryStore, **options: object) -> KvSharingConfig:
    given = {"chunk_tokens": CHUNK, "load_always": True, "min_wait_s": 5.0, **options}
    return KvSharingConfig(store, ROOT, **given)  # type: ignore[arg-type]


def request(seed: int, length: int = 30, max_tokens: int = 8) -> Request:
    tokens = [random.Random(seed).randrange(100) for _ in range(length)]
    return Request(tokens, SamplingConfig(temperature=1.0, seed=seed), max_tokens)


def run(engine: Engine, *requests: Request) -> list[list[int]]:
    handles = [engine.submit(each) for each in requests]
    found = [handle.result() for handle in handles]
    engine.audit()
    return found


def settle(engine: Engine) -> None:
    """Wait until what was to be saved is."""
    assert engine._core.sharing is not None
    assert engine._core.sharing._saver.flush(10)


class Faulty(MemoryStore):
    """A store that answers as `mood` says."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        super().__init__(nbytes)
        self.mood = "good"
        self.patience_s = 0.0

    def _stumble(self) -> None:
        if self.mood == "raises":
            raise StoreError("io", "no luck")
        if self.mood == "os error":
            raise OSError("no luck")
        if self.mood == "bug":
            raise KeyError("no luck")
        if self.mood == "late":
            time.sleep(self.patience_s)

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        return [True] * len(keys) if self.mood == "lies" else super().contains(keys)

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        self._stumble()
        found = super().get(keys)
        if self.mood == "swaps" and found:
            return found[::-1] if len(found) > 1 else [_other(found[0])]
        if self.mood == "others":
            return [_other(entry) for entry in found]
        if self.mood == "short":
            return found[:-1]
        if self.mood == "more":
            return [*found, *found]
        return found

    def put(self, entries: Sequence[KvEntry]) -> None:
        self._stumble()
        if self.mood != "forgets":
            super().put(entries)


def _other(entry: KvEntry) -> KvEntry:
    """The same bytes under the key of other tokens."""
    tokens = [token + 1 for token in entry.tokens]
    return KvEntry(KvChunkKey.after(ROOT, None, tokens), entry.data)


# ---- what it is for


def test_another_engine_finds_what_one_has_computed() -> None:
    store = MemoryStore(1 << 20)
    want = request(1)
    expected = alone(want, chunky=False)[0]
    first = engine_of(FakeBackend(), 64, sharing=sharing(store))
    assert run(first, want) == [expected]
    settle(first)
    saved = first.metrics.store
    assert saved is not None
    assert saved.saved_chunks == 4  # three of the prompt, one that the output completes
    first.close()
    second_backend = FakeBackend()
    second = engine_of(second_backend, 64, sharing=sharing(store))
    handle = second.submit(want)
    assert handle.result() == expected
    assert handle.progress.cached_tokens == 24
    counts = second.metrics.store
    assert counts is not None
    assert [(tier.name, tier.chunks) for tier in counts.tiers] == [("memory", 3)]
    assert counts.loaded_tokens == 24
    assert counts.saved_chunks == 0
    settle(second)
    assert run(second, want) == [expected]  # from the device this time
    assert second.metrics.store.lookups == 1
    assert "memory 3" in str(second.metrics)
    second.close()


def test_the_end_of_a_prompt_is_stored_too_when_it_is_long_enough() -> None:
    store = MemoryStore(1 << 20)
    want = request(2, length=CHUNK + PAGE_SIZE + 3)
    for tail, cached in ((PAGE_SIZE, CHUNK + PAGE_SIZE), (2 * PAGE_SIZE, CHUNK)):
        for _ in range(2):
            engine = engine_of(FakeBackend(), 64, sharing=sharing(store, min_tail_tokens=tail))
            handle = engine.submit(replace(want, max_tokens=1))
            handle.result()
            settle(engine)
            engine.close()
        assert handle.progress.cached_tokens == cached
        store.purge()


def test_outputs_are_stored_only_where_they_have_the_bits_of_prompts() -> None:
    want = request(3, length=10, max_tokens=20)
    for chunky, chunks in ((False, 3), (True, 1)):
        store = MemoryStore(1 << 20)
        engine = engine_of(FakeBackend(chunky=chunky), 64, sharing=sharing(store))
        expected = alone(want, chunky=chunky)[0]
        assert run(engine, want) == [expected]
        settle(engine)
        assert store.stats().num_entries == chunks
        longer = replace(want, tokens=[*want.tokens, *expected, 5])
        assert run(engine, longer) == [alone(longer, chunky=chunky)[0]]
        engine.close()


def test_requests_with_the_same_beginning_load_it_once() -> None:
    store = MemoryStore(1 << 20)
    prompt = request(4, length=40).tokens
    wants = [Request([*prompt, 50 + i, 60, 61], SamplingConfig(temperature=1.0, seed=i), 5) for i in range(6)]
    first = engine_of(FakeBackend(), 128, sharing=sharing(store))
    run(first, wants[0])
    settle(first)
    first.close()
    second = engine_of(FakeBackend(), 128, sharing=sharing(store), max_batch=4)
    assert run(second, *wants) == [alone(want, chunky=False)[0] for want in wants]
    counts = second.metrics.store
    assert counts is not None
    assert sum(tier.chunks for tier in counts.tiers) == 5
    second.close()


def test_loading_stops_where_it_does_not_pay() -> None:
    store = MemoryStore(1 << 20)
    want = request(5)
    for load_always in (True, False):
        engine = engine_of(FakeBackend(), 64, sharing=sharing(store, load_always=load_always))
        assert run(engine, want) == [alone(want, chunky=False)[0]]
        settle(engine)
        counts = engine.metrics.store
        assert counts is not None
        engine.close()
    assert counts.skipped == 3  # this backend computes in no time, as far as anybody knows
    assert counts.tiers == ()


def test_closing_saves_what_waits_and_a_closed_engine_takes_nothing() -> None:
    store = MemoryStore(1 << 20)
    engine = engine_of(FakeBackend(), 64, sharing=sharing(store))
    handle = engine.submit(request(6, length=24))
    for _ in range(5):
        next(handle)
    engine.close()
    assert store.stats().num_entries == 3
    assert handle.finish_reason == "cancelled"
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"gllm-kv-load", "gllm-kv-save"}


# ---- faults


@pytest.mark.parametrize("mood", MOODS)
def test_a_store_that_misbehaves_costs_no_output(mood: str) -> None:
    store = Faulty()
    wants = [request(seed, length=40) for seed in (7, 8)]
    expected = [alone(want, chunky=False)[0] for want in wants]
    filled = engine_of(FakeBackend(), 64, sharing=sharing(store))
    run(filled, wants[0])
    settle(filled)
    filled.close()
    store.mood, store.patience_s = mood, 0.05
    engine = engine_of(FakeBackend(), 64, sharing=sharing(store))
    for _ in range(2):
        assert run(engine, *wants) == expected
    settle(engine)
    assert run(engine, *wants) == expected
    engine.close()


def test_a_store_that_stalls_holds_a_request_up_for_a_bounded_time() -> None:
    store = Faulty()
    want = request(9)
    filled = engine_of(FakeBackend(), 64, sharing=sharing(store))
    run(filled, want)
    settle(filled)
    filled.close()
    store.mood, store.patience_s = "late", 1.5
    engine = engine_of(FakeBackend(), 64, sharing=sharing(store, min_wait_s=0.2, flush_s=3.0))
    start = time.perf_counter()
    assert run(engine, want) == [alone(want, chunky=False)[0]]
    assert time.perf_counter() - start < 0.8
    assert engine.metrics.store is not None
    assert engine.metrics.store.misses == {"late": 1}
    engine.close()


def test_others_go_on_while_one_waits_for_the_store() -> None:
    store = Faulty()
    waits, goes = request(10), request(11, length=6, max_tokens=40)
    filled = engine_of(FakeBackend(), 64, sharing=sharing(store))
    run(filled, waits)
    settle(filled)
    filled.close()
    engine = engine_of(FakeBackend(), 64, sharing=sharing(store))
    first = engine.submit(goes)
    next(first)
    store.mood, store.patience_s = "late", 0.3
    second = engine.submit(waits)
    start = time.perf_counter()
    assert first.result() == alone(goes, chunky=False)[0]
    assert time.perf_counter() - start < 0.2
    assert second.tokens == []
    assert second.result() == alone(waits, chunky=False)[0]
    assert second.progress.cached_tokens == 24
    engine.close()


@pytest.mark.parametrize("call", ["to_device", "to_host", "wait"])
def test_a_copy_that_fails_means_computing(call: str) -> None:
    store = MemoryStore(1 << 20)
    want = request(12)
    filled = engine_of(FakeBackend(), 64, sharing=sharing(store))
    run(filled, want)
    settle(filled)
    filled.close()

    def fault(name: str) -> None:
        if name == call:
            raise broken(name)

    other = request(13)
    engine = engine_of(FakeBackend(fault=fault), 64, sharing=sharing(store))
    assert run(engine, want, other) == [alone(each, chunky=False)[0] for each in (want, other)]
    counts = engine.metrics.store
    assert counts is not None
    assert counts.misses.get("copy", 0) == (call == "to_device")
    settle(engine)
    engine.close()


def test_requests_that_end_while_they_wait_leave_nothing_behind() -> None:
    store = Faulty()
    wants = [request(seed) for seed in range(20, 24)]
    filled = engine_of(FakeBackend(), 64, sharing=sharing(store))
    run(filled, *wants)
    settle(filled)
    filled.close()
    store.mood, store.patience_s = "late", 0.05
    engine = engine_of(FakeBackend(), 64, sharing=sharing(store))
    handles = [engine.submit(replace(want, deadline_s=0.02 if i == 1 else None)) for i, want in enumerate(wants)]
    engine.step()
    handles[0].cancel()
    for handle, want in zip(handles[1:], wants[1:], strict=True):
        handle.result()
        if handle.finish_reason != "deadline":
            assert handle.tokens == alone(want, chunky=False)[0]
    assert handles[1].finish_reason == "deadline"
    engine.audit()
    sharing_now = engine._core.sharing
    assert sharing_now is not None
    assert not sharing_now.fetcher._loads
    handles = [engine.submit(replace(want, tokens=[1, *want.tokens])) for want in wants]
    engine.step()
    engine.close()
    assert all(handle.done for handle in handles)


# ---- any order of everything


class Shared(Interleavings):
    """One small store for all machines, as for processes one after another. Its threads run when the rules say so."""

    store = Faulty(40_000)
    pending: ClassVar[deque[Callable[[], None]]] = deque()

    def __init__(self) -> None:
        super().__init__()
        self.store.mood = "good"
        self.pending.clear()
        self.at_once = True
        chunk = random.Random(len(self.store._held)).choice([4, 8])
        # `read` runs steps while no thread runs: what then waits must soon find that it is too late
        self.sharing = sharing(self.store, chunk_tokens=chunk, min_tail_tokens=4, min_wait_s=0.005)

    def before_step(self) -> None:
        if self.at_once:
            self._run(1000)

    @rule(count=st.integers(1, 5))
    def threads_run(self, count: int) -> None:
        self._run(count)

    def _run(self, count: int) -> None:
        while self.pending and count:
            self.pending.popleft()()
            count -= 1

    @rule(
        mood=st.sampled_from(
            ["good", "good", "good", "raises", "os error", "lies", "swaps", "others", "short", "more", "forgets"]
        )
    )
    def store_changes(self, mood: str) -> None:
        self.store.mood = mood

    @rule(at_once=st.booleans())
    def threads_change(self, at_once: bool) -> None:
        self.at_once = at_once

    @rule(call=st.sampled_from(["to_host", "to_device", "wait"]))
    def break_a_copy(self, call: str) -> None:
        self.faults = {call}

    def teardown(self) -> None:
        self.at_once = True
        self.store.mood = "good"
        super().teardown()
        if hasattr(self, "engine"):
            self._run(1000)
            self.store.audit()
            self.engine.close()


@pytest.fixture
def threads_on_demand(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Worker, "post", lambda self, job: Shared.pending.append(lambda: self.run_job(job)))
    monkeypatch.setattr(sharing_config, "MAX_BUFFERS", 400)  # nobody gives any back while the loader waits for one
    monkeypatch.setattr(sharing_fetch, "WAIT_S", 0.0)
    yield
    Shared.pending.clear()


@pytest.mark.usefixtures("threads_on_demand")
def test_interleavings_with_a_store() -> None:
    Shared.store.purge()
    run_state_machine_as_test(
        Shared,
        settings=settings(
            max_examples=int(os.environ.get("GLLM_INTERLEAVINGS", "200")),
            stateful_step_count=40,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        ),
    )
    assert Shared.store.stats().hits > 20  # how many depends on how fast the store's thread is beside the steps


def test_entries_are_what_the_pages_were() -> None:
    store = MemoryStore(1 << 20)
    want = request(14, length=CHUNK + 1)
    backend = FakeBackend()
    engine = engine_of(backend, 64, sharing=sharing(store))
    handle = engine.submit(want)
    next(handle)
    pages = list(engine.manager.pages(0))[:2]
    before = backend.pages[pages].copy()
    handle.result()
    settle(engine)
    [entry] = store.get([KvChunkKey.after(ROOT, None, list(want.tokens[:CHUNK]))])
    assert np.array_equal(entry.data.reshape(-1).view(np.uint64), before.ravel())
    engine.close()
    with suppress(StopIteration):
        next(handle)
