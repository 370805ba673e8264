"""Merged KV on both backends: the engine makes room by it, attention reads what tables name, costs are measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, load_cuda
from hostsim import session
from oracle import tiny_models

import gllm_driver as gllm
from gllm_driver.cli.app import run
from gllm_driver.config import DistillConfig, SwapConfig
from gllm_driver.engine.distill import page_arrays, page_bytes
from gllm_driver.errors import CapacityError, RequestError
from gllm_driver.kv.distill import distill_kv_pages
from gllm_driver.llm import demo_model_path
from gllm_driver.placement import Sharing
from gllm_driver.types import SequenceInput

CONTEXT = 256
CONFIG = DistillConfig(2, window=32)
TEXT = Path(json.__file__).read_text()
Load = Callable[..., gllm.LLM]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.hostsim)])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """Loads a model with little memory for KV."""
    options: dict[str, Any] = {"max_batch": 4, "prefix_reuse": False}
    if request.param == "cpu":

        def on_cpu(path: Path, **more: Any) -> gllm.LLM:
            return gllm.load(path, device="cpu", threads=2, context_length=CONTEXT, **options, **more)

        yield on_cpu
        return

    def on_cuda(
        path: Path, kv_distill: DistillConfig | None = None, cpu_reserve_mb: int = 512, **more: Any
    ) -> gllm.LLM:
        swap = SwapConfig(enable_swap=cpu_reserve_mb > 0, cpu_reserve_mb=cpu_reserve_mb)
        sharing = Sharing(swap=swap, distill=kv_distill, **options, **more)
        return load_cuda(path, context_length=CONTEXT, sharing=sharing)

    if session.on_real_gpu():
        yield on_cuda
        return
    stub = fresh(THREADS="2")
    yield on_cuda
    assert stub.live() == {}


def model(tmp_path: Path, name: str = "qwen3_tied") -> Path:
    return tiny_models.build(tiny_models.BY_NAME[name], tmp_path / name)


def prompts(count: int, length: int) -> list[list[int]]:
    g = np.random.default_rng(2)
    return [g.integers(3, 250, length).tolist() for _ in range(count)]


@pytest.mark.parametrize("reserve", [0, 64])
def test_requests_make_room_by_merging(load: Load, tmp_path: Path, reserve: int) -> None:
    """More KV than fits: sequences get smaller, some may leave as well, and all end."""
    options = {"max_tokens": 90, "temperature": 0, "ignore_eos": True}
    with load(model(tmp_path), kv_tokens=480, kv_distill=CONFIG, cpu_reserve_mb=reserve) as llm:
        results = llm.generate_batch(prompts(4, 100), **options)
        assert [len(result.tokens) for result in results] == [90] * 4
        assert llm.metrics.distilled_pages > 0
        assert "merged away" in str(llm.metrics)
        llm._engine.audit()
        again = llm.generate(prompts(1, 60)[0], **options)  # alone there is room: nothing is merged
        merged = llm.metrics.distilled_pages
        llm._engine.audit()
    with load(model(tmp_path), kv_tokens=480) as llm:
        assert llm.generate(prompts(1, 60)[0], **options).tokens == again.tokens
        assert llm.metrics.distilled_pages == 0
    assert merged > 0


def test_attention_reads_what_the_table_names(load: Load, tmp_path: Path) -> None:
    """A table that names a merged page twice, and pages that hold its contents twice, are the same to the last bit."""
    tokens = prompts(1, 200)[0]
    with load(model(tmp_path), kv_tokens=1024) as llm:
        engine = llm._engine

        def compare(backend: Any, weights: Any, kv: Any, batch: Any) -> np.ndarray:
            (sequence,) = batch.sequences
            pages = list(sequence.pages)
            backend.extend(weights, kv, SequenceInput(tokens[:160], 0, pages, False))
            old = page_arrays(backend.copy_pages_to_host(kv, pages[:10]), kv)
            assert np.array_equal(page_bytes(old), backend.copy_pages_to_host(kv, pages[:10]))
            made = distill_kv_pages(old, 2, "tokens", window=32, rope=engine.rope)
            rest = SequenceInput(tokens[160:], 160, pages)
            exact = backend.logits_forward(weights, kv, rest)
            backend.copy_pages_from_host(kv, pages[:10], page_bytes(made.restored()))
            restored = backend.logits_forward(weights, kv, rest)
            spare = list(range(kv.config.num_pages - len(made.pages), kv.config.num_pages))
            assert not set(spare) & set(pages)
            backend.copy_pages_from_host(kv, spare, page_bytes(made.pages))
            table = [spare[i] for i in made.table] + pages[10:]
            named = backend.logits_forward(weights, kv, SequenceInput(tokens[160:], 160, table))
            assert np.array_equal(named, restored)
            assert not np.array_equal(named, exact)
            return named[:1]

        engine.compute_whole([tokens], compare)
        engine.audit()


def test_what_it_costs(load: Load) -> None:
    with load(demo_model_path()) as llm:
        nothing = llm.distillation_cost(TEXT, DistillConfig(2, window=512), context=128, continuation=16, max_windows=2)
        assert nothing.ratio.value == 1
        assert nothing.nbytes_after == nothing.nbytes_before
        some = llm.distillation_cost(TEXT, CONFIG, context=128, continuation=16, max_windows=2)
        assert some.nbytes_after == 0.75 * some.nbytes_before  # of eight pages one is of sinks, two are the window
        assert some.exact == nothing.exact
        assert some.distilled != some.exact
        assert (some.windows, some.context, some.tokens) == (2, 128, 30)
        layers = llm.distillation_cost(
            TEXT, DistillConfig(4, "layers", window=32), context=128, continuation=16, max_windows=1
        )
        assert layers.nbytes_after < layers.nbytes_before
        sinks = DistillConfig(2, sinks=300, window=512)  # more than the context: all of it is kept
        all_kept = llm.distillation_cost(TEXT, sinks, context=128, continuation=16, max_windows=1)
        assert all_kept.ends.value == pytest.approx(all_kept.exact.value, rel=1e-5)
        with pytest.raises(RequestError, match="too short"):
            llm.distillation_cost("text", CONFIG, context=128)
        with pytest.raises(CapacityError):
            llm.distillation_cost(TEXT, CONFIG, context=4096)


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    for options, problem in (
        ({"kv_distill": "3"}, "2, 4 or 8"),
        ({"kv_distill": "2:layers"}, "at rest"),
        ({"kv_distill": "2", "deterministic": True}, "deterministic"),
    ):
        with pytest.raises(RequestError, match=problem):
            gllm.load(device="cpu", **options)
    with pytest.raises(RequestError, match="ALiBi"):
        gllm.load(model(tmp_path, "mpt"), device="cpu", kv_distill="2")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    line = ["kv", "distill", str(text), "--device", "cpu", "--windows", "1", "--context", "512", "--continuation", "16"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["nbytes_after"] < found["nbytes_before"]
    assert found["perplexity"]["exact"]["value"] > 1
    assert run(line) == 0
    assert "of the exact" in capfd.readouterr().out
    assert run(["kv", "distill", str(tmp_path / "none")]) == 2
    assert run(["generate", "x", "--kv-distill", "5"]) == 2
    assert "2, 4 or 8" in capfd.readouterr().err
