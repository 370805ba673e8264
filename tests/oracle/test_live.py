"""The engine, the goldens and the float64 model against transformers and llama.cpp, run here and now.

`pytest -m oracle` needs the `oracle` extra and fails without it; in a plain run these tests are skipped where it is not
installed. The llama.cpp part needs llama-cpp-python and is skipped without it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gllm_driver as gllm

from . import alibi_models, goldens, numpy_model, tiny_models, to_gguf

pytestmark = pytest.mark.oracle

ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS]
LLAMA_CPP_ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.gguf and row.llama_cpp]
ALIBI_ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.family in alibi_models.FAMILIES]
QUANTIZED_ROWS = ("llama3_gqa", "qwen3_tied", "qwen3_flat", "mistral_wide_heads")  # sizes of whole 32s

F32_BOUND = 1e-4
F16_GELU_BOUND = 2e-3


@pytest.fixture(scope="module")
def hf_oracle(request: pytest.FixtureRequest) -> ModuleType:
    if "oracle" not in request.config.option.markexpr:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    from . import hf_oracle

    return hf_oracle


@pytest.fixture(scope="module")
def llama_cpp_oracle() -> ModuleType:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from . import llama_cpp_oracle

    return llama_cpp_oracle


def _sequence(row: tiny_models.Row) -> list[int]:
    return goldens.load(row).tokens


def _engine_greedy(llm: Any, row: tiny_models.Row) -> list[int]:
    result = llm.generate(tiny_models.prompt(row), max_tokens=tiny_models.NUM_GREEDY, temperature=0.0, ignore_eos=True)
    return list(result.tokens)


@pytest.mark.parametrize("row", ROWS)
def test_goldens_can_be_made_again(row: tiny_models.Row, hf_oracle: ModuleType, tmp_path: Path) -> None:
    from . import make_goldens

    committed, made = goldens.load(row), make_goldens.make(row, tmp_path)
    assert made.fingerprint == committed.fingerprint
    assert made.greedy == committed.greedy
    # Two f32 evaluations on two machines: no closer than each is to float64.
    goldens.check_close(made.logits, committed.logits, 2 * make_goldens.MAX_DISAGREEMENT, row.name)


@pytest.mark.parametrize("row", ROWS)
def test_f32_against_transformers(row: tiny_models.Row, hf_oracle: ModuleType, tmp_path: Path) -> None:
    directory, tokens = tiny_models.build(row, tmp_path), _sequence(row)
    model = hf_oracle.load(directory, "f32")
    with gllm.load(directory, device="cpu", dtype="f32") as llm:
        goldens.check_close(llm.logits(tokens), hf_oracle.logits(model, tokens), F32_BOUND, row.name)
        greedy = _engine_greedy(llm, row)
    assert greedy == hf_oracle.greedy(model, tiny_models.prompt(row), tiny_models.NUM_GREEDY)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_half_precision_against_transformers(
    row: tiny_models.Row, dtype: str, hf_oracle: ModuleType, tmp_path: Path
) -> None:
    # A value rounded to bf16 (f16) is off by up to 2^-9 (2^-12) of itself, 0.6 of that as a root mean square; how far
    # some 25 such roundings a layer carry to the logits depends on the model. transformers rounds every weight and
    # every activation, so its own distance from the float64 model is the error of the type for this model. An engine
    # that rounds fewer values has less of it. Over 56 positions the size of the noise repeats to some 10 %, so half
    # as much again is room enough, and a wrong result is 1 rather than 0.003 (f16) or 0.03 (bf16).
    directory, tokens = tiny_models.build(row, tmp_path), _sequence(row)
    exact = numpy_model.logits(tiny_models.config(row), tiny_models.weights(row), tokens)
    theirs = goldens.rms_error(hf_oracle.logits(hf_oracle.load(directory, dtype), tokens), exact)
    with gllm.load(directory, device="cpu", dtype=dtype) as llm:
        ours = goldens.rms_error(llm.logits(tokens), exact)
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("row", LLAMA_CPP_ROWS)
def test_llama_cpp_reads_our_gguf_as_transformers_reads_the_directory(
    row: tiny_models.Row, llama_cpp_oracle: ModuleType, tmp_path: Path
) -> None:
    path, golden = to_gguf.convert(row, tmp_path / "model.gguf"), goldens.load(row)
    with llama_cpp_oracle.load(path) as theirs:
        logits = llama_cpp_oracle.logits(theirs, golden.tokens)
        greedy = llama_cpp_oracle.greedy(theirs, tiny_models.prompt(row), tiny_models.NUM_GREEDY)
    goldens.check_close(logits[list(goldens.POSITIONS)], golden.logits, 2e-5, row.name)
    assert greedy == golden.greedy


@pytest.mark.parametrize("row", ALIBI_ROWS)
def test_alibi_against_llama_cpp(row: tiny_models.Row, llama_cpp_oracle: ModuleType, tmp_path: Path) -> None:
    # It takes GELU in the tanh form, from a table of f16 values, for every model: off by up to 2^-11 of each.
    path, tokens = to_gguf.convert(row, tmp_path / "model.gguf"), _sequence(row)
    with llama_cpp_oracle.load(path) as theirs, gllm.load(path, device="cpu", dtype="f32") as llm:
        goldens.check_close(llm.logits(tokens), llama_cpp_oracle.logits(theirs, tokens), F16_GELU_BOUND, row.name)
        greedy = llama_cpp_oracle.greedy(theirs, tiny_models.prompt(row), tiny_models.NUM_GREEDY)
        assert _engine_greedy(llm, row) == greedy


@pytest.mark.parametrize("row", LLAMA_CPP_ROWS)
def test_f32_gguf_against_llama_cpp(row: tiny_models.Row, llama_cpp_oracle: ModuleType, tmp_path: Path) -> None:
    path, tokens = to_gguf.convert(row, tmp_path / "model.gguf"), _sequence(row)
    with llama_cpp_oracle.load(path) as theirs, gllm.load(path, device="cpu", dtype="f32") as llm:
        goldens.check_close(llm.logits(tokens), llama_cpp_oracle.logits(theirs, tokens), F32_BOUND, row.name)
        greedy = llama_cpp_oracle.greedy(theirs, tiny_models.prompt(row), tiny_models.NUM_GREEDY)
        assert _engine_greedy(llm, row) == greedy


@pytest.mark.parametrize("file_type", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", QUANTIZED_ROWS)
def test_stored_types_are_no_further_from_exact_than_llama_cpp(
    name: str, file_type: to_gguf.FileType, llama_cpp_oracle: ModuleType, tmp_path: Path
) -> None:
    # llama.cpp rounds activations to the type's dot-product partner (f16, bf16, int8 blocks of 32): the same room.
    row = tiny_models.BY_NAME[name]
    path, tokens = to_gguf.convert(row, tmp_path / "model.gguf", file_type), _sequence(row)
    exact = numpy_model.logits(tiny_models.config(row), to_gguf.dequantized(row, path), tokens)
    with llama_cpp_oracle.load(path) as theirs, gllm.load(path, device="cpu", dtype="auto") as llm:
        their_error = goldens.rms_error(llama_cpp_oracle.logits(theirs, tokens), exact)
        our_error = goldens.rms_error(llm.logits(tokens), exact)
    assert our_error <= 1.5 * their_error
