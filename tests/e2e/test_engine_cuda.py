"""Many requests on the CUDA backend, deterministic: each says bit for bit what it says alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from cuda_models import fresh, open_cuda, tiny
from hostsim import session

import gllm_driver as gllm
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.placement import Sharing, place

pytestmark = pytest.mark.hostsim

MODEL = "llama3_gqa"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    if session.on_real_gpu():
        yield
        return
    stub = fresh(THREADS="2")
    yield
    assert stub.live() == {}


def load(sharing: Sharing) -> gllm.LLM:
    checkpoint = open_checkpoint(tiny(MODEL), progress=False)
    engine = place(checkpoint, open_cuda(deterministic=True), "auto", 96, None, sharing, True)
    return gllm.LLM(checkpoint, engine.backend, engine, 0.0)


def requests(vocab_size: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts, several of which begin alike, with greedy and drawn outputs."""
    rng = random.Random(3)
    system = [rng.randrange(3, vocab_size) for _ in range(32)]
    found = []
    for i in range(8):
        own = [rng.randrange(3, vocab_size) for _ in range(rng.choice((1, 2, 5, 20)))]
        drawn = {"temperature": 1.0, "top_k": 20, "seed": i} if i % 2 else {"temperature": 0.0}
        found.append(([*system, *own] if i % 3 else own, {"max_tokens": 6 + i, "ignore_eos": True, **drawn}))
    return found


def test_company_changes_nothing() -> None:
    with load(Sharing(max_batch=1, prefix_reuse=False)) as llm:
        work = requests(llm.arch.vocab_size)
        alone = [llm.generate(prompt, **options).tokens for prompt, options in work]
    with load(Sharing(max_batch=4, chunk_size=16)) as llm:
        streams = [llm.stream(prompt, **options) for prompt, options in work]
        assert [stream.read_all().tokens for stream in streams] == alone
        assert llm.metrics.cached_tokens > 0
        llm._engine.audit()
    with load(Sharing(max_batch=4, chunk_size=16, kv_tokens=96)) as llm:
        streams = [llm.stream(prompt, **options) for prompt, options in work]
        assert [stream.read_all().tokens for stream in streams] == alone
        llm._engine.audit()
