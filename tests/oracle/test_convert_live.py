"""What `gllm quantize` makes of Hugging Face directories, read by llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from gllm_driver.convert.run import Options, quantize

from . import goldens, tiny_models

pytestmark = pytest.mark.oracle
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.gguf and row.llama_cpp]


@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_reads_it_as_transformers_reads_the_directory(row: tiny_models.Row, tmp_path: Path) -> None:
    from . import llama_cpp_oracle

    source, golden = tiny_models.build(row, tmp_path / "hf"), goldens.load(row)
    quantize(str(source), tmp_path / "out.gguf", Options("f32"))
    with llama_cpp_oracle.load(tmp_path / "out.gguf") as theirs:
        logits = llama_cpp_oracle.logits(theirs, golden.tokens)
        greedy = llama_cpp_oracle.greedy(theirs, tiny_models.prompt(row), tiny_models.NUM_GREEDY)
    goldens.check_close(logits[list(goldens.POSITIONS)], golden.logits, 2e-5, row.name)
    assert greedy == golden.greedy
