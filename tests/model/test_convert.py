"""Models of every family through the quantizer: into GGUF and into a directory, they stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oracle import tiny_models

import gllm_driver as gllm
from gllm_driver.convert.activations import Stream, calls_of
from gllm_driver.convert.encode import source_rows
from gllm_driver.convert.run import Options, quantize
from gllm_driver.loaders.open import open_checkpoint

ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS]
GGUF_ROWS = [pytest.param(row, id=row.name) for row in tiny_models.ROWS if row.gguf]
TOKENS = [3, 17, 5, 40, 9, 2, 33, 12, 21, 6, 4, 30]


def logits(path: Path, dtype: str = "f32") -> np.ndarray:
    with gllm.load(path, device="cpu", dtype=dtype, threads=1) as llm:
        return llm.logits(TOKENS)


@pytest.mark.parametrize("row", GGUF_ROWS)
def test_hugging_face_to_gguf(row: tiny_models.Row, tmp_path: Path) -> None:
    source = tiny_models.build(row, tmp_path / "hf")
    quantize(str(source), tmp_path / "out.gguf", Options("f32"))
    before, after = logits(source), logits(tmp_path / "out.gguf")
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()


@pytest.mark.parametrize("row", ROWS)
def test_hugging_face_to_a_directory_and_on(row: tiny_models.Row, tmp_path: Path) -> None:
    source = tiny_models.build(row, tmp_path / "hf")
    if any(t.shape[-1] % 32 for t in open_checkpoint(source).tensors.values() if len(t.shape) == 2):
        pytest.skip("rows of no whole blocks")
    quantize(str(source), tmp_path / "int8", Options("int8"))
    quantize(str(tmp_path / "int8"), tmp_path / "again", Options("int8_32m"))
    before = logits(source)
    for path in (tmp_path / "int8", tmp_path / "again"):
        off = logits(path) - before
        assert np.sqrt(np.square(off).mean()) < 0.06 * before.std()  # two roundings to 8 bits, and those of activations


@pytest.mark.parametrize("row", ROWS)
def test_the_forward_pass_of_calibration(row: tiny_models.Row, tmp_path: Path) -> None:
    path = tiny_models.build(row, tmp_path)
    checkpoint = open_checkpoint(path)
    arrays = {slot: source_rows(t, 0, t.shape[0]) for slot, t in checkpoint.tensors.items()}
    vectors = {slot: a[0] for slot, a in arrays.items() if len(checkpoint.tensors[slot].shape) == 1}
    ids = np.array([TOKENS, TOKENS[::-1]])
    stream = Stream(checkpoint.arch, vectors, arrays["embed"][ids])
    calls = calls_of(checkpoint.arch)
    for call in calls:
        stream.apply(call, {name: arrays[slot] for name, slot in call.slots.items()})
    found = stream.inputs(calls[-1])(0) @ arrays.get("lm_head", arrays["embed"]).T
    expected = logits(path)
    assert np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()
