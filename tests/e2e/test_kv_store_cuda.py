"""KV shared between the CPU and the CUDA backend, and by the CUDA backend with itself to the last bit."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, open_cuda, tiny
from hostsim import session

import gllm_driver as gllm
from gllm_driver import placement
from gllm_driver.backends.cpu import CpuBackend
from gllm_driver.engine.sharing import KvSharingConfig
from gllm_driver.kv.store import KvEntry, MemoryStore
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.placement import Sharing, place

pytestmark = pytest.mark.hostsim

MODEL = "qwen2_bias"
PROMPT = [random.Random(5).randrange(3, 90) for _ in range(75)]
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    options = {"chunk_tokens": 32, "load_always": True, "min_wait_s": 60.0, "flush_s": 60.0}
    monkeypatch.setattr(placement, "KvSharingConfig", functools.partial(KvSharingConfig, **options))
    stub = fresh()
    yield
    stub.set_faults("")
    assert session.on_real_gpu() or stub.live() == {}


def load(path: Path, on: str, store: MemoryStore, *, deterministic: bool = False) -> gllm.LLM:
    backend = CpuBackend(1) if on == "cpu" else open_cuda(deterministic=deterministic)
    checkpoint = open_checkpoint(path, progress=False)
    engine = place(checkpoint, backend, "auto", 128, None, Sharing(kv_store=store), deterministic)
    return gllm.LLM(checkpoint, backend, engine, 0.0)


def entries(llm: gllm.LLM, store: MemoryStore) -> list[KvEntry]:
    """What the store has of the prompt, under the keys of a model."""
    sharing = llm._engine._core.config.kv_sharing
    assert sharing is not None
    llm._engine._core.sharing._saver.flush(60)  # type: ignore[union-attr]
    return store.get(sharing.keys(PROMPT))


@pytest.mark.parametrize("model", [MODEL, "llama32_tied"])
def test_kv_of_one_backend_serves_the_other(model: str) -> None:
    """Entries of each are the other's within rounding, under the same keys; outputs of these models are equal."""
    path = tiny(model)
    stores = {on: MemoryStore(1 << 26) for on in ("cpu", "cuda")}
    tokens, made = {}, {}
    for on, store in stores.items():
        with load(path, on, store) as llm:
            tokens[on] = llm.generate(PROMPT, **GREEDY).tokens
            made[on] = entries(llm, store)
    assert tokens["cpu"] == tokens["cuda"]
    assert len(made["cpu"]) == len(made["cuda"]) == 2
    for of_cpu, of_cuda in zip(made["cpu"], made["cuda"], strict=True):
        assert of_cpu.key == of_cuda.key
        a, b = (e.array().astype(np.float64) for e in (of_cpu, of_cuda))
        assert np.abs(a - b).max() < 0.05 * np.abs(a).max()
    for on, other in (("cpu", "cuda"), ("cuda", "cpu")):
        with load(path, on, stores[other]) as llm:
            result = llm.generate(PROMPT, **GREEDY)
            assert result.tokens == tokens[on]
            assert result.cached_tokens == 64
            assert llm.metrics.store.tiers[0].chunks == 2  # type: ignore[union-attr]


def test_deterministic_kv_stays_with_its_kind() -> None:
    """To the bit what computing gives; the KV of the other backend is not even found."""
    path, store = tiny(MODEL), MemoryStore(1 << 26)
    drawn = {**GREEDY, "temperature": 1.5, "seed": 7, "max_tokens": 20}
    with load(path, "cpu", store, deterministic=True) as llm:
        llm.generate(PROMPT, **drawn)
        entries(llm, store)
    with load(path, "cuda", store, deterministic=True) as llm:
        computed = llm.generate(PROMPT, **drawn)
        made = entries(llm, store)
        assert llm.metrics.store.loaded_tokens == 0  # type: ignore[union-attr]
        assert llm.metrics.store.saved_chunks == 2  # type: ignore[union-attr]  # of the prompt, none of the output
    assert computed.cached_tokens == 0
    with load(path, "cuda", store, deterministic=True) as llm:
        loaded = llm.generate(PROMPT, **drawn)
        assert [np.array_equal(a.data, b.data) for a, b in zip(entries(llm, store), made, strict=True)] == [True] * 2
    assert loaded.cached_tokens == 64
    assert loaded.tokens == computed.tokens


def test_copies_that_fail_cost_the_request_nothing_but_time() -> None:
    if session.on_real_gpu():
        pytest.skip("tells the simulated device what to do")
    path, store = tiny(MODEL), MemoryStore(1 << 26)
    stub = session.stub()
    with load(path, "cuda", store) as llm:
        expected = llm.generate(PROMPT, **GREEDY).tokens
        entries(llm, store)
    with load(path, "cuda", store) as llm:
        handle = llm.stream(PROMPT, **GREEDY)
        llm._engine._core.absorb()
        assert llm._engine._core.sharing is not None
        assert llm._engine._core.sharing.fetcher.loader.flush(60)
        stub.set_faults("cuMemcpyHtoDAsync:1=1")  # the copy of the first chunk
        assert handle.read_all().tokens == expected
        assert llm.metrics.store.misses == {"copy": 1}  # type: ignore[union-attr]
        stub.set_faults("")
        llm._engine.audit()
