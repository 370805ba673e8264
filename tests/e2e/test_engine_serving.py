"""Threads, asyncio, deadlines, faults and long runs on a backend without a model."""

from __future__ import annotations

import asyncio
import gc
import random
import sys
import threading
import time

import pytest
from fake_backend import VOCAB, FakeBackend, broken
from test_engine_interleavings import alone, engine_of

from gllm_driver.config import SamplingConfig
from gllm_driver.engine import Engine, Request
from gllm_driver.engine.async_engine import AsyncEngine
from gllm_driver.errors import BackendError, CapacityError, ContextLost, RequestError


def request(i: int, max_tokens: int = 12, **options: object) -> Request:
    rng = random.Random(i)
    prompt = [rng.randrange(3) for _ in range(rng.randint(1, 20))]
    return Request(prompt, SamplingConfig(temperature=1, seed=i), max_tokens, **options)  # type: ignore[arg-type]


def engine(num_pages: int = 64, **options: int) -> Engine:
    return engine_of(FakeBackend(), num_pages, **options)


def expected(i: int, max_tokens: int = 12) -> list[int]:
    return alone(request(i, max_tokens), chunky=False)[0]


# ---- who runs the steps


def test_streams_read_in_turn_share_steps() -> None:
    subject = engine()
    handles = [subject.submit(request(i)) for i in range(4)]
    for together in zip(*handles, strict=True):
        assert len(together) == 4
    assert [handle.tokens for handle in handles] == [expected(i) for i in range(4)]
    assert subject.metrics.steps <= 16


def test_nothing_happens_while_nobody_waits() -> None:
    subject = engine()
    handle = subject.submit(request(0))
    assert handle.tokens == []
    assert not handle.done
    assert subject.step()
    assert len(handle.tokens) == 1


def test_threads_take_turns() -> None:
    subject = engine(max_batch=6)
    outputs: dict[int, list[int]] = {}

    def read(i: int) -> None:
        for j in range(i, 200, 8):
            outputs[j] = list(subject.submit(request(j)))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert outputs == {i: expected(i) for i in range(200)}
    subject.audit()
    assert subject.manager.stats().num_used == 0


def test_a_waiting_thread_is_served_by_another_that_never_stops() -> None:
    """One thread reads without pause; the other's tokens are there, and it sees them soon."""
    subject = engine(num_pages=600)
    stop = threading.Event()

    def busy() -> None:
        i = 0
        while not stop.is_set():
            list(subject.submit(request(i, 40)))
            i += 1

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        start = time.perf_counter()
        for i in range(20):
            assert list(subject.submit(request(i))) == expected(i)
        assert time.perf_counter() - start < 20
    finally:
        stop.set()
        thread.join(30)


def test_any_thread_may_cancel() -> None:
    subject = engine(num_pages=600)
    handles = [subject.submit(request(i, 44)) for i in range(20)]

    def cancel() -> None:
        for handle in handles[::2]:
            handle.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    for handle in handles:
        list(handle)
    thread.join(10)
    for i, handle in enumerate(handles):
        whole = expected(i, 44)
        assert handle.tokens == whole[: len(handle.tokens)] if i % 2 == 0 else whole
    assert subject.manager.stats().num_used == 0


def test_asyncio_reads_many_at_once() -> None:
    async def run() -> None:
        async with AsyncEngine(engine(max_batch=5)) as subject:

            async def read(i: int) -> list[int]:
                return [token async for token in subject.submit(request(i))]

            outputs = await asyncio.wait_for(asyncio.gather(*(read(i) for i in range(60))), 30)
            assert outputs == [expected(i) for i in range(60)]
            handle = subject.submit(request(7))
            assert await handle.result() == expected(7)
            assert handle.finish_reason == "length"

    asyncio.run(run())


def test_a_cancelled_task_cancels_its_request() -> None:
    async def run() -> None:
        backend = FakeBackend(fault=lambda call: time.sleep(0.002))
        core = engine_of(backend, 64)
        async with AsyncEngine(core) as subject:
            handle = subject.submit(request(1, 40))
            task = asyncio.create_task(handle.result())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(100):
                if handle.done:
                    break
                await asyncio.sleep(0.01)
            assert handle.finish_reason == "cancelled"
            async with subject.submit(request(2, 40)) as left_early:
                await anext(left_early)
        assert left_early.finish_reason == "cancelled"
        assert core.manager.stats().num_used == 0

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_thread_fails_every_request_and_says_so() -> None:
    has_bug = True

    def fault(call: str) -> None:
        if has_bug:
            raise ZeroDivisionError("a bug")

    async def run() -> None:
        nonlocal has_bug
        subject = AsyncEngine(engine_of(FakeBackend(fault=fault), 64))
        with pytest.raises(BackendError, match="ZeroDivisionError: a bug"):
            await asyncio.wait_for(subject.submit(request(0)).result(), 10)
        has_bug = False
        assert await asyncio.wait_for(subject.submit(request(1)).result(), 10) == expected(1)  # by another thread
        await subject.aclose()

    asyncio.run(run())


def test_a_request_that_comes_while_the_thread_is_stopped_starts_another() -> None:
    async def run() -> None:
        subject = AsyncEngine(engine_of(FakeBackend(fault=lambda call: time.sleep(0.02)), 64))
        first = subject.submit(request(0, 40))
        await asyncio.sleep(0.03)
        closing = asyncio.create_task(subject.aclose())
        await asyncio.sleep(0.005)
        second = subject.submit(request(1))
        await asyncio.wait_for(closing, 10)
        assert await asyncio.wait_for(second.result(), 10) == expected(1)
        first.cancel()
        await subject.aclose()
        assert "gllm-engine" not in {thread.name for thread in threading.enumerate()}

    asyncio.run(run())


# ---- ends


def test_deadlines_end_what_runs_and_what_waits() -> None:
    subject = engine_of(FakeBackend(fault=lambda call: time.sleep(0.003)), 64, max_batch=1)
    running = subject.submit(request(0, 40, deadline_s=0.03))
    waiting = subject.submit(request(1, 40, deadline_s=0.001))
    unhurried = subject.submit(request(2, 5, deadline_s=60.0))
    assert unhurried.result() == expected(2, 5)
    assert running.finish_reason == waiting.finish_reason == "deadline"
    assert 0 < len(running.tokens) < 40
    assert running.tokens == expected(0, 40)[: len(running.tokens)]
    assert waiting.result() == []
    assert subject.metrics.requests == {"deadline": 2, "length": 1}


def test_an_observer_may_end_its_request() -> None:
    seen: list[int] = []

    def enough(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    subject = engine()
    handle = subject.submit(request(0, 12, on_token=enough))
    other = subject.submit(request(1))
    assert handle.result() == seen == expected(0)[:3]
    assert handle.finish_reason == "stop"
    assert other.result() == expected(1)


def test_a_failing_observer_ends_its_request_alone() -> None:
    def fail(token: int) -> bool:
        raise RequestError("no such token")

    subject = engine()
    bad, good = subject.submit(request(0, 12, on_token=fail)), subject.submit(request(1))
    assert good.result() == expected(1)
    with pytest.raises(RequestError, match="no such token"):
        bad.result()


def test_close_ends_everything() -> None:
    subject = engine()
    handle = subject.submit(request(0))
    next(handle)
    subject.close()
    assert handle.finish_reason == "cancelled"
    with pytest.raises(RequestError, match="closed"):
        subject.submit(request(1))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tokens": []}, RequestError),
        ({"tokens": [VOCAB]}, RequestError),
        ({"tokens": [1] * 64}, CapacityError),
        ({"tokens": [1] * 40, "max_tokens": 20}, CapacityError),  # in the context, but not in 10 pages
    ],
)
def test_what_can_never_run_is_refused_at_once(changes: dict, error: type[Exception]) -> None:
    subject = engine(num_pages=10)
    with pytest.raises(error):
        subject.submit(Request(**{"tokens": [1], "sampling": SamplingConfig(), "max_tokens": 4, **changes}))
    assert subject.step() is False


def test_senseless_requests_cannot_be_made() -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        Request([1], SamplingConfig(), 0)
    with pytest.raises(RequestError, match="deadline_s"):
        Request([1], SamplingConfig(), 1, deadline_s=float("nan"))


def test_deadlines_of_what_has_ended_are_forgotten() -> None:
    subject = engine()
    steady = subject.submit(request(0, 40, deadline_s=1e6))
    for i in range(500):
        subject.submit(request(i, 1, deadline_s=1e6)).result()
    assert len(subject._core._deadlines) < 100
    assert not steady.done or len(steady.tokens) == 40


# ---- faults


@pytest.mark.parametrize("call", ["forward", "sample", "start_decode", "step"])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_step_that_fails_once_is_made_up_for(call: str, at: int) -> None:
    """Together it fails, alone it works: nobody notices."""
    backend = FakeBackend()
    backend.fault = lambda name: _raise(broken(name)) if name == call and backend.calls[name] == at else None
    subject = engine_of(backend, 64)
    handles = [subject.submit(request(i)) for i in range(3)]
    assert [handle.result() for handle in handles] == [expected(i) for i in range(3)]
    assert at > 1 or backend.calls[call] > 1


def test_a_lone_request_gets_the_error() -> None:
    backend = FakeBackend()
    backend.fault = lambda name: _raise(broken(name)) if name == "step" and backend.calls[name] == 3 else None
    subject = engine_of(backend, 64)
    handle = subject.submit(request(0))
    with pytest.raises(BackendError, match="injected"):
        handle.result()
    assert handle.tokens == expected(0)[:3]
    assert subject.submit(request(0)).result() == expected(0)
    subject.audit()


def test_who_cannot_be_computed_fails_alone() -> None:
    """A forward pass fails whenever a certain sequence is in it."""
    backend = FakeBackend()
    subject = engine_of(backend, 64)
    poison = subject.submit(Request([99, 98, 97], SamplingConfig(seed=5), 8))
    compute = backend._compute

    def fussy(tokens, position, pages):  # type: ignore[no-untyped-def]
        if 98 in tokens:
            raise BackendError("cannot compute 98")
        return compute(tokens, position, pages)

    backend._compute = fussy  # type: ignore[method-assign]
    others = [subject.submit(request(i)) for i in range(3)]
    assert [handle.result() for handle in others] == [expected(i) for i in range(3)]
    with pytest.raises(BackendError, match="cannot compute 98"):
        poison.result()
    assert subject.metrics.requests == {"error": 1, "length": 3}


def test_a_lost_device_fails_everybody_without_retrying() -> None:
    error = ContextLost(700, "ILLEGAL_ADDRESS", "cuLaunchKernel", "start it again")
    backend = FakeBackend()
    backend.fault = lambda name: _raise(error) if name == "step" else None
    subject = engine_of(backend, 64)
    handles = [subject.submit(request(i)) for i in range(3)]
    for handle in handles:
        with pytest.raises(ContextLost):
            handle.result()
    assert backend.calls["step"] == 1


def _raise(error: Exception) -> None:
    raise error


# ---- memory


def test_sixty_percent_of_the_memory_is_enough() -> None:
    """Pinned to 60 % of what the workload holds at once, it swaps, and says the same."""
    count, tokens = 8, 40
    needed = sum(-(-(len(request(i).tokens) + tokens - 1) // 4) for i in range(count))
    subject = engine_of(FakeBackend(), needed * 6 // 10, slots=needed, max_batch=count, prefix_reuse=False)
    handles = [subject.submit(request(i, tokens)) for i in range(count)]
    while subject.step():
        subject.audit()
    assert [handle.tokens for handle in handles] == [expected(i, tokens) for i in range(count)]
    metrics = subject.metrics
    assert metrics.swapped_out_pages == metrics.swapped_in_pages > 0
    assert metrics.recomputes == 0
    assert metrics.pages_used == metrics.pages_swapped == 0


def test_without_host_memory_kv_is_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(call: str) -> None:
        if call == "alloc_swap_space":
            raise CapacityError("swap space does not fit")

    subject = engine_of(FakeBackend(fault=refuse), 24, max_batch=8, prefix_reuse=False)
    handles = [subject.submit(request(i, 40)) for i in range(8)]
    assert [handle.result() for handle in handles] == [expected(i, 40) for i in range(8)]
    assert subject.metrics.recomputes > 1
    assert [record.getMessage() for record in caplog.records] == [
        "KV pages cannot be swapped and will be computed again: swap space does not fit"
    ]


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    """In little memory, with prefixes, cancellations and errors."""
    count = 10_000
    backend = FakeBackend()
    backend.nan_tokens = {13}
    subject = engine_of(backend, 40, slots=30, max_batch=6)
    rng = random.Random(1)
    live = []
    for i in range(count):
        live.append((i, subject.submit(request(i, rng.randint(1, 20), priority=rng.randrange(2), flow=str(i % 3)))))
        for _ in range(rng.randint(0, 6)):
            subject.step()
        if i % 17 == 0:
            live[-1][1].cancel()
        live = [(j, handle) for j, handle in live if not handle.done]
        if i % 100 == 0:
            subject.audit()
    while subject.step():
        pass
    subject.audit()
    del live
    gc.collect()
    core, stats = subject._core, subject.manager.stats()
    assert stats.num_used == stats.num_swapped == 0
    assert not core.mailbox.live
    assert not core.mailbox.inbox
    assert not core._deadlines
    assert not core.scheduler.waiting._queues
    assert backend.open_loops == 0
    assert sum(subject.metrics.requests.values()) == count


def test_looking_at_logits_makes_room_and_gives_it_back() -> None:
    subject = engine(num_pages=14)
    handles = [subject.submit(request(i, 30)) for i in range(2)]
    for handle in handles:
        next(handle)
    assert subject.logits([1] * 40).shape == (40, VOCAB)
    assert subject.metrics.preemptions > 0
    assert [handle.result() for handle in handles] == [expected(i, 30) for i in range(2)]
    with pytest.raises(CapacityError):
        subject.logits([1] * 65)
    small = engine(num_pages=8)
    with pytest.raises(CapacityError, match="the cache has 8"):
        small.logits([1] * 40)
    small.audit()


# ---- prefixes and figures


def test_a_shared_beginning_is_computed_once() -> None:
    backend = FakeBackend()
    subject = engine_of(backend, 400, max_batch=4)
    system = list(range(32))
    handles = [subject.submit(Request([*system, 100 + i, 1], SamplingConfig(seed=i), 4)) for i in range(10)]
    for handle in handles:
        handle.result()
    assert [handle.progress.cached_tokens for handle in handles] == [0] + [32] * 9
    assert subject.metrics.cached_tokens == 9 * 32
    without = engine_of(FakeBackend(), 400, prefix_reuse=False)
    for i, handle in enumerate(handles):
        again = without.submit(Request([*system, 100 + i, 1], SamplingConfig(seed=i), 4))
        assert again.result() == handle.tokens
        assert again.progress.cached_tokens == 0


def test_metrics_may_be_read_while_steps_run() -> None:
    subject = engine()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    done = threading.Event()

    def work() -> None:
        try:
            for _ in range(40):
                for handle in [subject.submit(request(i, 2)) for i in range(8)]:
                    handle.result()
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not done.is_set():
            assert subject.metrics.pages_total
    finally:
        sys.setswitchinterval(interval)
        thread.join()


def test_metrics_tell_what_happened() -> None:
    subject = engine(max_batch=2)
    handles = [subject.submit(request(i, 6)) for i in range(3)]
    subject.step()
    metrics = subject.metrics
    assert (metrics.running, metrics.waiting, metrics.preempted) == (2, 1, 0)
    assert 0 < metrics.page_use < 1
    for handle in handles:
        handle.result()
    metrics = subject.metrics
    assert metrics.output_tokens == 18
    assert metrics.prompt_tokens == sum(len(request(i).tokens) for i in range(3))
    assert metrics.time_to_first_token.num == 3
    assert metrics.inter_token_latency.num == 15
    assert metrics.inter_token_latency.p99 >= metrics.inter_token_latency.p50 > 0
    assert metrics.as_dict()["requests"] == {"length": 3}
    assert "18 output" in str(metrics)
