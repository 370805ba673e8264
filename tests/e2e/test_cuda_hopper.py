"""Whole models on a device of compute capability 9.0, whose many tokens go through warpgroups, against the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_models import fresh, kernels, load_cuda, tiny
from hostsim import session
from oracle import tiny_models

import gllm_driver as gllm
from gllm_driver.launch import _wgmma
from gllm_driver.types import SequenceInput

pytestmark = pytest.mark.hostsim

CONTEXT = 160
BOUNDS = {"f16": 4e-3, "bf16": 3e-2}  # rounding of the stored type, relative to the largest logit


def symbols_used(llm: gllm.LLM) -> set[str]:
    backend: Any = llm._backend
    modules = backend.runtime.library._modules.values()
    return {symbol for module in modules for symbol in module._functions}


@pytest.mark.parametrize("name", ["llama3_gqa", "qwen3_tied.f16"])
def test_long_prompts(name: str) -> None:
    """Logits of every token, in one piece and after a part, twice: launched one by one, then as a graph."""
    row_name, _, file_type = name.partition(".")
    row = tiny_models.BY_NAME[row_name]
    path, kind = tiny(row_name, file_type), file_type or row.dtype
    stub = None if session.on_real_gpu() else fresh(CC="9.0", THREADS="2")
    tokens = np.random.default_rng(3).integers(0, row.sizes[0], 2 * _wgmma.MIN_TOKENS + 13).tolist()
    with gllm.load(path, device="cpu", context_length=CONTEXT) as cpu:
        expected = cpu.logits(tokens)
    with load_cuda(path, context_length=CONTEXT, kernels=kernels("90"), deterministic=False) as llm:
        if stub is None and llm._backend.runtime.props.cc != _wgmma.CC:  # type: ignore[attr-defined]
            pytest.skip("needs a device of compute capability 9.0")
        backend, weights, kv = llm._backend, llm._engine.weights, llm._engine.kv
        pages = list(range(-(-len(tokens) // 16)))
        for _ in range(3):
            found = [llm.logits(tokens)]
            first = len(tokens) - _wgmma.MIN_TOKENS
            for start, end in ((0, first), (first, len(tokens))):
                piece = backend.logits_forward(weights, kv, SequenceInput(tokens[start:end], start, pages))
                found.append(np.asarray(piece))
            for logits in (found[0], np.concatenate(found[1:])):
                error = np.abs(logits - expected).max()
                assert error <= BOUNDS[kind] * np.abs(expected).max()
        used = symbols_used(llm)
        assert any(f"linear__wgmma_{kind}" in symbol for symbol in used), used
        assert any(f"fused_qkv_rope__wgmma_{kind}" in symbol for symbol in used)
        assert any(f"fused_gate_up_silu__wgmma_{kind}" in symbol for symbol in used)
    if stub is not None:
        assert stub.live() == {}
