"""Many requests on the real CPU backend: each says bit for bit what it says alone, whatever memory and company do."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import gllm_driver as gllm
from gllm_driver.errors import BackendError, CapacityError, RequestError

PROMPTS = ["import os\n\ndef ", "class Queue:\n", "def fibonacci(n):", "for", "x = [", "# end of a comment\nimport "]
NUM = 120


def options(i: int) -> dict[str, Any]:
    """Sampling of all kinds."""
    rng = random.Random(i)
    drawn = {"temperature": 1.0, "top_k": 40} if i % 3 else {"temperature": 0.0}
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.1} if i % 4 == 1 else {}
    return {"max_tokens": rng.randint(1, 50), "seed": i, "ignore_eos": i % 2 == 0, **drawn, **penalties}


def prompt(i: int) -> str:
    return PROMPTS[i % len(PROMPTS)] * (1 + i % 5)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What the requests say alone, nothing shared, nothing swapped."""
    with gllm.load(device="cpu", threads=1, context_length=256, max_batch=1, prefix_reuse=False) as llm:
        return [llm.generate(prompt(i), **options(i)).tokens for i in range(NUM)]


@pytest.fixture(scope="module")
def llm() -> Iterator[gllm.LLM]:
    with gllm.load(device="cpu", threads=1, context_length=256, max_batch=7) as model:
        yield model


def test_company_changes_nothing(llm: gllm.LLM, expected: list[list[int]]) -> None:
    streams = [llm.stream(prompt(i), **options(i)) for i in range(NUM)]
    order = list(range(NUM))
    random.Random(0).shuffle(order)
    for i in order:
        assert streams[i].read_all().tokens == expected[i]
    assert llm.metrics.cached_tokens > 0
    llm._engine.audit()


@pytest.mark.parametrize("reserve_mb", [64, 0])
def test_little_memory_changes_nothing(expected: list[list[int]], reserve_mb: int) -> None:
    """10 pages for what 8 sequences of up to 8 pages want, prefixes on; without swap space KV is computed again."""
    with gllm.load(
        device="cpu", threads=1, context_length=256, max_batch=8, kv_tokens=160, cpu_reserve_mb=reserve_mb
    ) as llm:
        streams = [llm.stream(prompt(i), **options(i)) for i in range(NUM)]
        assert [stream.read_all().tokens for stream in streams] == expected
        metrics = llm.metrics
        assert metrics.preemptions > 0
        assert (metrics.swapped_out_pages > 0) == (reserve_mb > 0)
        assert reserve_mb > 0 or metrics.recomputes > 0
        assert metrics.pages_used == metrics.pages_swapped == 0
        llm._engine.audit()


def test_sixty_percent_of_the_memory_swaps_and_says_the_same() -> None:
    def run(**memory: int) -> tuple[list[list[int]], gllm.Metrics]:
        with gllm.load(device="cpu", threads=1, context_length=256, max_batch=8, prefix_reuse=False, **memory) as llm:
            streams = [
                llm.stream([5 + i] * 60, max_tokens=100, temperature=1.0, seed=i, ignore_eos=True) for i in range(8)
            ]
            return [stream.read_all().tokens for stream in streams], llm.metrics

    pages = 8 * -(-(60 + 99) // 16)
    plain, unpressed = run()
    pinned, pressed = run(kv_tokens=16 * (pages * 6 // 10))
    assert pinned == plain
    assert unpressed.swapped_out_pages == 0
    assert pressed.swapped_out_pages == pressed.swapped_in_pages > 0


def test_a_batch_is_its_single_generations(llm: gllm.LLM) -> None:
    common = {"max_tokens": 20, "temperature": 0.0}
    results = llm.generate_batch(PROMPTS, **common)
    for result, text in zip(results, PROMPTS, strict=True):
        assert isinstance(result, gllm.GenerationResult)
        assert (result.text, result.tokens) == (llm.generate(text, **common).text, llm.generate(text, **common).tokens)
    mixed = llm.generate_batch(["x", [], "for"], return_errors=True, **common)
    assert isinstance(mixed[1], RequestError)
    assert [type(mixed[i]) for i in (0, 2)] == [gllm.GenerationResult] * 2
    with pytest.raises(RequestError, match="empty"):
        llm.generate_batch(["x", []], **common)


def test_asyncio_streams_the_same_text(llm: gllm.LLM) -> None:
    async def read(i: int) -> tuple[str, str]:
        stream = llm.async_stream(prompt(i), **options(i))
        pieces = [piece async for piece in stream]
        return "".join(pieces), stream.result.text

    async def read_all() -> list[tuple[str, str]]:
        return await asyncio.wait_for(asyncio.gather(*(read(i) for i in range(12))), 60)

    for i, (pieces, text) in enumerate(asyncio.run(read_all())):
        assert pieces == text == llm.generate(prompt(i), **options(i)).text


def test_threads_and_a_loop_share_one_model(llm: gllm.LLM, expected: list[list[int]]) -> None:
    outputs: dict[int, list[int]] = {}

    def read(first: int) -> None:
        for i in range(first, 40, 4):
            outputs[i] = llm.generate(prompt(i), **options(i)).tokens

    async def read_too() -> None:
        for i in range(40, 50):
            stream = llm.async_stream(prompt(i), **options(i))
            async for _ in stream:
                pass
            outputs[i] = stream.result.tokens

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    asyncio.run(asyncio.wait_for(read_too(), 60))
    for thread in threads:
        thread.join(60)
    assert outputs == {i: expected[i] for i in range(50)}


def test_a_stop_string_ends_one_stream_of_several(llm: gllm.LLM) -> None:
    whole = llm.generate(PROMPTS[0], max_tokens=40, temperature=0, ignore_eos=True)
    stop = whole.text[10:14]
    other = llm.stream(PROMPTS[2], max_tokens=40, temperature=0, ignore_eos=True)
    stopped = llm.stream(PROMPTS[0], max_tokens=40, temperature=0, ignore_eos=True, stop=[stop])
    assert other.read_all().text == llm.generate(PROMPTS[2], max_tokens=40, temperature=0, ignore_eos=True).text
    result = stopped.read_all()
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish_reason == "stop"
    assert len(result.tokens) < 40


def test_a_stream_that_is_dropped_is_cancelled(llm: gllm.LLM) -> None:
    ended = llm.metrics.requests.get("cancelled", 0)
    stream = llm.stream(PROMPTS[0], max_tokens=100, ignore_eos=True)
    next(stream)
    del stream
    deadline = time.monotonic() + 10  # a thread that is running a step sees to it after that step
    while llm.metrics.pages_used and time.monotonic() < deadline:
        time.sleep(0.001)
    assert llm.metrics.requests["cancelled"] == ended + 1
    assert llm.metrics.pages_used == 0


def test_a_conversation_computes_only_what_is_new(llm: gllm.LLM) -> None:
    first = llm.generate([9] * 40, max_tokens=40, temperature=0, ignore_eos=True)
    again = [*[9] * 40, *first.tokens, 11, 12, 13]
    second = llm.generate(again, max_tokens=5, temperature=0, ignore_eos=True)
    assert second.cached_tokens == 64  # of 79 with KV, the full pages
    with gllm.load(device="cpu", threads=1, context_length=256, prefix_reuse=False) as fresh:
        assert fresh.generate(again, max_tokens=5, temperature=0, ignore_eos=True).tokens == second.tokens


def test_closing_the_model_ends_its_streams() -> None:
    llm = gllm.load(device="cpu", threads=1, context_length=64)
    stream = llm.stream("x", max_tokens=50, ignore_eos=True)
    next(stream)
    llm.close()
    assert len(list(stream)) <= 1
    assert stream.result.finish_reason == "interrupted"
    with pytest.raises(RequestError, match="closed"):
        llm.generate("x")


def test_a_request_for_more_than_the_cache_is_refused() -> None:
    with gllm.load(device="cpu", threads=1, context_length=256, kv_tokens=64) as llm:
        with pytest.raises(CapacityError, match="the device has 4"):
            llm.generate([5] * 30, max_tokens=40)
        assert len(llm.generate([5] * 30, max_tokens=30, ignore_eos=True).tokens) == 30


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"chunk_size": 3}, {"kv_tokens": 0}])
def test_senseless_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        gllm.load(device="cpu", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
def test_interleavings_on_the_real_backend(
    expected: list[list[int]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come, are read, cancelled, in any order, in little memory, while copies and steps fail now and then."""
    rng = random.Random(seed)
    memory = {
        "max_batch": rng.randint(2, 6),
        "kv_tokens": 16 * rng.randint(9, 16),
        "chunk_size": rng.choice([4, 16, 64]),
    }
    with gllm.load(device="cpu", threads=1, context_length=256, **memory) as llm:
        engine, backend = llm._engine, llm._engine.backend

        def failing(name: str, share: float) -> None:
            call = getattr(backend, name)

            def maybe(*args: Any) -> Any:
                if rng.random() < share:
                    raise BackendError(f"injected fault in {name}")
                return call(*args)

            monkeypatch.setattr(backend, name, maybe)

        for name in ("swap_out_pages", "swap_in_pages", "start_decode"):
            failing(name, 0.2)
        streams: dict[int, gllm.TextStream] = {}
        cancelled, errors = set(), 0
        waiting = list(range(40))
        while waiting or streams:
            if waiting and rng.random() < 0.3:
                i = waiting.pop(0)
                streams[i] = llm.stream(prompt(i), **options(i))
            for _ in range(rng.randint(0, 8)):
                engine.step()
            engine.audit()
            if streams and rng.random() < 0.1:
                i = rng.choice(list(streams))
                streams[i].close()
                cancelled.add(i)
            for i in [i for i, stream in streams.items() if stream._handle.done]:
                stream = streams.pop(i)
                tokens = stream._handle.tokens
                if i in cancelled or stream._handle.finish_reason == "error":
                    errors += stream._handle.finish_reason == "error"
                    assert tokens == expected[i][: len(tokens)]
                else:
                    assert tokens == expected[i]
        assert errors < 20  # a fault ends a request only when it was alone
        assert engine.manager.stats().num_used == engine.manager.stats().num_swapped == 0
