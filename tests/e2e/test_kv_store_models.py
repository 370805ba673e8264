"""KV through a store on real models: the same output as computed, to the last bit, across backends within rounding."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gllm_driver as gllm
from gllm_driver.errors import RequestError
from gllm_driver.kv.store import MemoryStore
from gllm_driver.llm import demo_model_path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "gllm_driver", "generate"]
DRAWN: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 3, "ignore_eos": True}  # sensitive to the logits


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(3, 200) for _ in range(length)]


@pytest.fixture(scope="module")
def computed() -> dict[int, list[int]]:
    with gllm.load(device="cpu", threads=1) as llm:
        return {n: llm.generate(prompt(n), **DRAWN).tokens for n in (100, 300, 600)}


def test_what_a_store_brings_gives_the_output_that_computing_gives(computed: dict[int, list[int]]) -> None:
    store = MemoryStore(1 << 28)
    cached = {}
    for turn in range(2):
        with gllm.load(device="cpu", threads=1, kv_store=store) as llm:
            llm._engine._core.sharing.costs._always = True
            for n, expected in computed.items():
                result = llm.generate(prompt(n), **DRAWN)
                assert result.tokens == expected
                cached[turn, n] = result.cached_tokens
            assert str(llm.metrics).count("KV store") == 1
    assert [cached[0, n] for n in computed] == [0, 96, 288]  # prompts begin alike: the device finds that
    assert [cached[1, n] for n in computed] == [96, 256, 592]  # an end of 44 tokens is not stored
    assert llm.metrics.store.saved_chunks == 0
    assert llm.metrics.as_dict()["store"]["lookups"] == 3


def test_the_bits_of_kv_do_not_depend_on_threads_or_chunks() -> None:
    """Or what one process stores would not be what another computes."""
    found = []
    for threads, chunk_size in ((1, 64), (2, None), (2, 20)):
        store = MemoryStore(1 << 28)
        with gllm.load(device="cpu", threads=threads, chunk_size=chunk_size, kv_store=store) as llm:
            stream = llm.stream(prompt(50, 1), **DRAWN)
            next(stream)  # decodes while the other prompt is computed
            llm.generate(prompt(300), **DRAWN)
            stream.close()
            keys = llm._engine._core.config.kv_sharing.keys(prompt(300))
        found.append(store.get(keys))
        assert len(found[-1]) == 1
    for entries in found[1:]:
        assert np.array_equal(entries[0].data, found[0][0].data)


def test_another_model_or_type_finds_nothing(tmp_path: Path) -> None:
    store = MemoryStore(1 << 28)
    data = bytearray(demo_model_path().read_bytes())
    data[len(data) * 6 // 10] ^= 1  # one weight among millions, where no sample is taken
    tuned = tmp_path / "tuned.gguf"
    tuned.write_bytes(data)
    for path, options in ((None, {}), (tuned, {}), (None, {"dtype": "f32"}), (None, {"deterministic": True})):
        with gllm.load(path, device="cpu", threads=1, kv_store=store, **options) as llm:
            llm._engine._core.sharing.costs._always = True
            assert llm.generate(prompt(300), **DRAWN).cached_tokens == 0
            assert llm.metrics.store.lookups == 1
            assert llm.metrics.store.loaded_tokens == 0


def test_options_that_make_no_sense_are_refused_before_the_model_is_opened() -> None:
    with pytest.raises(RequestError, match="tape:"):
        gllm.load("no-such-model", kv_store="tape:/dev/st0")
    with pytest.raises(RequestError, match="prefix_reuse"):
        gllm.load(device="cpu", kv_store="memory:1MiB", prefix_reuse=False)


def test_the_command_takes_a_store_and_says_what_it_was_worth() -> None:
    done = subprocess.run(
        [
            *COMMAND,
            "--device",
            "cpu",
            "--max-tokens",
            "2",
            "--verbose",
            "--kv-store",
            "memory:64MiB",
            "def f(x):\n" * 60,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "KV store  1 requests asked, 0 tokens loaded" in done.stderr
    assert "KV saved" in done.stderr
    wrong = subprocess.run(
        [*COMMAND, "--kv-store", "memory", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) <= 2
