"""Rotary frequencies against transformers: golden numbers in every run, live in the oracle suite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import CONFIG

from gllm_driver.errors import ModelFormatError
from gllm_driver.models.arch import Arch, RopeScaling
from gllm_driver.models.hf_config import arch_of_config
from gllm_driver.models.rope import rope_inv_freq

# name → (head_dim, rope settings of config.json, max_position_embeddings, context length in use)
CASES: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "default": (64, {"rope_type": "default", "rope_theta": 10000.0}, 2048, 2048),
    "linear": (64, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, 2048, 2048),
    "llama3.1": (
        128,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
        131072,
        131072,
    ),
    "yarn": (
        128,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
        131072,
        131072,
    ),
    "yarn betas, mscale": (
        64,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        },
        163840,
        163840,
    ),
    "yarn explicit": (
        64,
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "attention_factor": 1.25,
        },
        4096,
        4096,
    ),
    "dynamic, short": (64, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 2048, 2048),
    "dynamic, long": (64, {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 2048, 6000),
}

# From transformers 5.23 (ROPE_INIT_FUNCTIONS, f32): attention factor, frequencies of pairs 0, n/4, n/2, 3n/4, n−1.
GOLDEN: dict[str, tuple[float, list[float]]] = {
    "default": (1, [1, 0.1, 0.0099999998, 0.001, 0.00013335215]),
    "linear": (1, [0.25, 0.025, 0.0024999999, 0.00025000001, 3.3338038e-05]),
    "llama3.1": (1, [1, 0.037606031, 0.00052484602, 6.6478697e-06, 3.0689259e-07]),
    "yarn": (1.13862944, [1, 0.031622779, 0.00060294115, 7.9056936e-06, 3.1023444e-07]),
    "yarn betas, mscale": (0.873940458, [1, 0.1, 0.0056666667, 2.4999999e-05, 3.3338035e-06]),
    "yarn explicit": (1.25, [1, 0.066346154, 0.00125, 0.00012500001, 1.6669019e-05]),
    "dynamic, short": (1, [1, 0.1, 0.0099999998, 0.001, 0.00013335215]),
    "dynamic, long": (1, [1, 0.066499434, 0.0044221748, 0.00029407212, 2.7442242e-05]),
}


def config_of(case: str) -> dict[str, Any]:
    head_dim, rope, max_positions, _ = CASES[case]
    config = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    return {**config, "head_dim": head_dim, "max_position_embeddings": max_positions, "rope_parameters": rope}


def arch_of(case: str) -> Arch:
    return arch_of_config(config_of(case), ["lm_head.weight"], Path("config.json"))


def sampled(values: np.ndarray) -> list[float]:
    n = len(values)
    return [float(values[i]) for i in (0, n // 4, n // 2, 3 * n // 4, n - 1)]


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    inv_freq, attention_factor = rope_inv_freq(arch_of(case), None, CASES[case][3])
    golden_factor, golden = GOLDEN[case]
    assert inv_freq.dtype == np.float64
    assert inv_freq.shape == (CASES[case][0] // 2,)
    assert attention_factor == pytest.approx(golden_factor, rel=1e-6)
    assert sampled(inv_freq) == pytest.approx(golden, rel=2e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_live(case: str) -> None:
    expected, factor = from_transformers(case)
    inv_freq, attention_factor = rope_inv_freq(arch_of(case), None, CASES[case][3])
    assert attention_factor == pytest.approx(factor, rel=1e-6)
    np.testing.assert_allclose(inv_freq, expected, rtol=3e-6)


def from_transformers(case: str) -> tuple[np.ndarray, float]:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(**config_of(case))
    kind = config.rope_parameters["rope_type"]
    compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    inv_freq, factor = compute(config, device=None, seq_len=CASES[case][3])
    return inv_freq.double().numpy(), factor


def test_ntk_divides_the_last_frequency_by_the_factor() -> None:
    arch = arch_of("default")
    plain, _ = rope_inv_freq(arch, None, 2048)
    stretched, factor = rope_inv_freq(replace(arch, rope_scaling=RopeScaling(kind="ntk", factor=4.0)), None, 2048)
    assert stretched[0] == 1.0
    assert stretched[-1] == pytest.approx(plain[-1] / 4.0, rel=1e-12)
    assert factor == 1.0


def test_factors_divide_and_must_fit() -> None:
    arch = replace(arch_of("default"), rope_scaling=RopeScaling(kind="factors"))
    factors = np.linspace(1.0, 8.0, 32, dtype=np.float32)
    inv_freq, _ = rope_inv_freq(arch, factors, 2048)
    np.testing.assert_allclose(inv_freq * factors, rope_inv_freq(arch_of("default"), None, 2048)[0], rtol=1e-12)
    for bad in (factors[:-1], factors * 0, factors * math.nan, factors * math.inf, -factors):
        with pytest.raises(ModelFormatError, match="32 positive numbers"):
            rope_inv_freq(arch, bad, 2048)
    with pytest.raises(ModelFormatError, match="factors missing"):
        rope_inv_freq(arch, None, 2048)
    with pytest.raises(ModelFormatError, match="factors given"):
        rope_inv_freq(arch_of("default"), factors, 2048)


def test_partial_rotation_has_the_frequencies_of_a_smaller_head() -> None:
    arch = replace(arch_of("default"), rotary_dim=32)
    inv_freq, _ = rope_inv_freq(arch, None, 2048)
    np.testing.assert_allclose(inv_freq, 10000.0 ** (-np.arange(0, 32, 2) / 32), rtol=1e-12)


def test_yarn_ramp_of_no_width_is_a_step() -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context_length=7, beta_fast=32.0, beta_slow=1.0)
    inv_freq, _ = rope_inv_freq(replace(arch_of("default"), rope_scaling=scaling), None, 2048)
    assert np.isfinite(inv_freq).all()
