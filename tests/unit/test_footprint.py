"""The memory said to be needed is the memory that is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracle import tiny_models

import gllm_driver as gllm
from gllm_driver.cli.info import _model_lines, describe, memory
from gllm_driver.loaders.open import open_checkpoint


@pytest.mark.parametrize("name", ["llama3_gqa", "qwen3_tied", "bloom"])
def test_the_footprint_is_what_a_loaded_model_takes(name: str, tmp_path: Path) -> None:
    path = tiny_models.build(tiny_models.BY_NAME[name], tmp_path / "model")
    checkpoint = open_checkpoint(path)
    need = memory(checkpoint, 400)["cpu"]
    assert need["total"] == need["weights"] + need["kv"] + need["workspace"]
    with gllm.load(path, device="cpu", context_length=400, max_batch=1) as llm:
        llm.generate([t % 250 for t in range(390)], max_tokens=4, ignore_eos=True)
        backend, engine = llm._backend, llm._engine
        matrices = {t.address: t for t in engine.weights.tensors.values()}.values()
        assert need["weights"] == sum(t.nbytes for t in matrices)
        spare = engine.kv.tensor.nbytes - need["kv"]
        assert 0 <= spare <= 2 * engine.kv.config.page_nbytes
        arrays = sum(array.nbytes for array in backend._steps._workspace._arrays.values())
        team = backend._team._state
        taken = arrays + int(team["shared_nbytes"]) + backend.num_threads * int(team["private_nbytes"])
        assert need["workspace"] == pytest.approx(taken, rel=0.1, abs=1 << 16)


def test_a_context_costs_what_its_pages_cost(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.build(tiny_models.BY_NAME["mqa"], tmp_path / "model"))
    small, large = memory(checkpoint, 1600), memory(checkpoint, 2_100_000)
    for kind in ("cpu", "cuda"):
        assert large[kind]["weights"] == small[kind]["weights"]
        assert large[kind]["kv"] * 1600 == small[kind]["kv"] * 2_100_000
        assert large[kind]["workspace"] > small[kind]["workspace"]  # page table, and partial results of attention
    facts = {**describe(checkpoint), "memory": large}
    json.dumps(facts)
    text = "\n".join(_model_lines(facts))
    assert "memory for 2,100,000 tokens (more than the 512 it was made for)" in text
    assert "    cuda " in text
