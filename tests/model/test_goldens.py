"""Every family and option against what transformers computes, by committed results: no torch is needed here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import goldens, numpy_model, tiny_models, to_gguf

import gllm_driver as gllm

ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS]
GGUF_ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.gguf]
HALF_ROWS = (
    "mpt",
    "bloom_twelve_heads",
    "llama3_gqa",
    "llama31_nested",
    "qwen25_tied",
    "qwen3_flat",
    "mistral_window",
    "odd_llama",
)
# Rows of whole 32s, as block types need: rotated rows interleaved in GGUF and a head of its own; neither; ALiBi.
QUANTIZED_ROWS = ("llama3_gqa", "qwen3_tied", "mpt", "bloom")

F32_BOUND = 1e-4
POSITIONS = list(goldens.POSITIONS)

Directory = Callable[[tiny_models.Row], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """Builds a row's Hugging Face directory on first use."""
    root = tmp_path_factory.mktemp("tiny_models")

    def get(row: tiny_models.Row) -> Path:
        path = root / row.name
        return path if path.exists() else tiny_models.build(row, path)

    return get


# ---- the goldens and the float64 model check each other


@pytest.mark.parametrize("row", ROWS)
def test_rebuilt_models_are_the_ones_the_goldens_were_made_from(row: tiny_models.Row) -> None:
    assert tiny_models.fingerprint(row) == goldens.load(row).fingerprint, "run tests.oracle.make_goldens again"


@pytest.mark.parametrize("row", ROWS)
def test_float64_model_gives_the_goldens(row: tiny_models.Row) -> None:
    golden = goldens.load(row)
    exact = numpy_model.logits(tiny_models.config(row), tiny_models.weights(row), golden.tokens)
    goldens.check_close(golden.logits, exact[POSITIONS], 1e-5, row.name)
    assert exact[tiny_models.PROMPT_LENGTH - 1 : -1].argmax(axis=-1).tolist() == golden.greedy


def _without_scaling(config: dict[str, Any]) -> None:
    if config.get("rope_parameters"):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    config["rope_scaling"] = None


def _with(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({key: value})


def _with_rope(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["rope_parameters"].update({key: value})


def _with_attention(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["attn_config"].update({key: value})


MISREADINGS = [
    ("llama2_mha", _with("rope_theta", 500000.0)),
    ("llama3_gqa", _with("rope_theta", 10000.0)),
    ("llama31_nested", _without_scaling),
    ("llama31_nested", _with_rope("high_freq_factor", 2.0)),
    ("llama31_nested", _with_rope("original_max_position_embeddings", 512)),
    ("llama32_tied", _without_scaling),
    ("rope_linear", _without_scaling),
    ("rope_linear_nested", _without_scaling),
    ("rope_yarn", _without_scaling),
    ("rope_yarn_explicit", _without_scaling),
    ("rope_yarn_explicit", _with_rope("attention_factor", None)),
    ("rope_yarn_explicit", _with_rope("beta_fast", 32.0)),
    ("rope_yarn_explicit", _with_rope("beta_slow", 1.0)),
    ("qwen2_bias", _with("use_sliding_window", True)),
    ("qwen2_windows", _with("use_sliding_window", False)),
    ("qwen2_windows", _with("max_window_layers", 0)),
    ("qwen2_windows", _with("sliding_window", 13)),
    ("qwen3_layer_types", _with("layer_types", ["full_attention"] * 3)),
    ("qwen3_layer_types", _with("layer_types", ["sliding_attention"] * 3)),
    ("mistral_window", _with("sliding_window", None)),
    ("mistral_window", _with("sliding_window", 17)),
    ("mistral_window", _with("sliding_window", 15)),
    ("mqa", _with("rms_norm_eps", 1e-6)),
    ("mpt", _with_attention("alibi_bias_max", 4)),
    ("mpt_six_heads", _with_attention("alibi_bias_max", 16)),
    ("mpt", _with("layer_norm_epsilon", 1e-2)),
    ("bloom", _with("layer_norm_epsilon", 1e-2)),
]


@pytest.mark.parametrize(("name", "misread"), MISREADINGS)
def test_goldens_notice_a_misread_option(name: str, misread: Callable[[dict[str, Any]], None]) -> None:
    row = tiny_models.BY_NAME[name]
    golden, config, weights = goldens.load(row), copy.deepcopy(tiny_models.config(row)), tiny_models.weights(row)
    misread(config)
    wrong = numpy_model.logits(config, weights, golden.tokens)[POSITIONS]
    assert goldens.relative_error(wrong, golden.logits) > 50 * F32_BOUND


@pytest.mark.parametrize("part", ["q_norm.weight", "k_proj.bias", "o_proj.bias", "gate_proj.bias", "down_proj.bias"])
def test_goldens_notice_a_forgotten_tensor(part: str) -> None:
    row = tiny_models.BY_NAME["qwen3_tied" if "norm" in part else "llama_bias"]
    golden, neutral = goldens.load(row), 1.0 if "norm" in part else 0.0
    weights = {k: np.full_like(v, neutral) if k.endswith(part) else v for k, v in tiny_models.weights(row).items()}
    wrong = numpy_model.logits(tiny_models.config(row), weights, golden.tokens)[POSITIONS]
    assert goldens.relative_error(wrong, golden.logits) > 50 * F32_BOUND


def test_check_close_fails_on_nan_and_on_a_single_wrong_logit() -> None:
    good = np.random.default_rng(0).standard_normal((3, 5000))
    goldens.check_close(good, good, 0.0, "the same")
    for value in (np.nan, np.inf, 1.0):
        bad = good.copy()
        bad[1, 7] += value
        with pytest.raises(AssertionError, match="relative error"):
            goldens.check_close(bad, good, 0.02, "one wrong element")
    with pytest.raises(ValueError, match="shape"):
        goldens.check_close(good[:2], good, 1.0, "a missing row")


# ---- the engine


def _check_f32(row: tiny_models.Row, logits: np.ndarray, greedy: list[int]) -> None:
    """transformers' logits at the golden's positions, the float64 model's at every position, and the same tokens."""
    golden = goldens.load(row)
    goldens.check_close(logits[POSITIONS], golden.logits, F32_BOUND, row.name)
    exact = numpy_model.logits(tiny_models.config(row), tiny_models.weights(row), golden.tokens)
    goldens.check_close(logits, exact, F32_BOUND, row.name)
    assert greedy == golden.greedy


@pytest.mark.parametrize("row", ROWS)
def test_f32_logits_and_greedy_tokens_are_those_of_transformers(row: tiny_models.Row, directory: Directory) -> None:
    golden = goldens.load(row)
    with gllm.load(directory(row), device="cpu", dtype="f32") as llm:
        logits = llm.logits(golden.tokens)
        result = llm.generate(
            tiny_models.prompt(row), max_tokens=tiny_models.NUM_GREEDY, temperature=0.0, ignore_eos=True
        )
    assert logits.dtype == np.float32
    _check_f32(row, logits, list(result.tokens))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", HALF_ROWS)
def test_half_precision_is_no_worse_than_transformers(name: str, dtype: str, directory: Directory) -> None:
    # The golden holds how far transformers' own logits in this type are from exact: that is the error of rounding every
    # weight and activation to the type, amplified by this very model. Rounding fewer values gives less; two draws of
    # such noise differ little over 14 positions × 200+ logits, and a half covers that.
    row = tiny_models.BY_NAME[name]
    golden = goldens.load(row)
    with gllm.load(directory(row), device="cpu", dtype=dtype) as llm:
        logits = llm.logits(golden.tokens)
    assert np.isfinite(logits).all()
    assert goldens.rms_error(logits[POSITIONS], golden.logits) <= 1.5 * golden.rounding[dtype]


@pytest.mark.parametrize("row", GGUF_ROWS)
def test_gguf_f32_gives_what_the_directory_gives(row: tiny_models.Row, tmp_path: Path) -> None:
    golden = goldens.load(row)
    path = to_gguf.convert(row, tmp_path / "model.gguf")
    with gllm.load(path, device="cpu", dtype="f32") as llm:
        logits = llm.logits(golden.tokens)
        result = llm.generate(
            tiny_models.prompt(row), max_tokens=tiny_models.NUM_GREEDY, temperature=0.0, ignore_eos=True
        )
    _check_f32(row, logits, list(result.tokens))


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
@pytest.mark.parametrize("name", QUANTIZED_ROWS)
def test_gguf_half_types_are_read_exactly(name: str, file_type: to_gguf.FileType, tmp_path: Path) -> None:
    row = tiny_models.BY_NAME[name]
    path = to_gguf.convert(row, tmp_path / "model.gguf", file_type)
    tokens = goldens.load(row).tokens
    exact = numpy_model.logits(tiny_models.config(row), to_gguf.dequantized(row, path), tokens)
    with gllm.load(path, device="cpu", dtype="f32") as llm:
        logits = llm.logits(tokens)
    goldens.check_close(logits, exact, F32_BOUND, f"{name} {file_type}")


def _round_to_int8_blocks(x: np.ndarray) -> np.ndarray:
    """Rows in blocks of 32, each rounded to 255 even steps, as an engine with int8 dot products rounds activations."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    step = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(step == 0, 1, step)) * step).reshape(x.shape)


@pytest.mark.parametrize("file_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", QUANTIZED_ROWS)
def test_gguf_block_types_mean_their_dequantized_weights(
    name: str, file_type: to_gguf.FileType, tmp_path: Path
) -> None:
    # An engine may round activations to int8 blocks for its dot products. The float64 model with just that rounding
    # says what it may cost here; llama.cpp lands within 6 % of that figure on these files.
    row = tiny_models.BY_NAME[name]
    config = tiny_models.config(row)
    path = to_gguf.convert(row, tmp_path / "model.gguf", file_type)
    weights = to_gguf.dequantized(row, path)
    tokens = goldens.load(row).tokens
    exact = numpy_model.logits(config, weights, tokens)
    allowed = goldens.rms_error(numpy_model.logits(config, weights, tokens, _round_to_int8_blocks), exact)
    with gllm.load(path, device="cpu", dtype="f32") as llm:
        logits = llm.logits(tokens)
        result = llm.generate(
            tiny_models.prompt(row), max_tokens=tiny_models.NUM_GREEDY, temperature=0.0, ignore_eos=True
        )
    assert goldens.rms_error(logits, exact) <= 1.5 * allowed
    # Greedy steps must follow the exact model wherever its choice is clear of that noise.
    generated = list(result.tokens)
    steps = numpy_model.logits(config, weights, tiny_models.prompt(row) + generated)[tiny_models.PROMPT_LENGTH - 1 : -1]
    lead = steps.max(axis=-1) - steps[np.arange(len(generated)), generated]
    assert np.all(lead <= 6 * allowed * steps.std(axis=-1))
