"""What happens to weights on the way to the CPU backend: checked once, used in place, converted only when asked."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracle import tiny_models, to_gguf

import gllm_driver as gllm
from cpu_backend.compile import Library
from cpu_backend.upload import Uploader
from gllm_driver.errors import ModelFormatError
from gllm_driver.loaders.open import open_checkpoint
from gllm_driver.types import BF16, DTYPES, F16, F32, Tensor

ROW = next(row for row in tiny_models.ROWS if row.name == "llama3_gqa")
NUMPY = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, kind: str, poison: float) -> None:
    path = to_gguf.convert(ROW, tmp_path / "model.gguf", kind)
    tensor = open_checkpoint(path).tensors["layers.1.down"]
    data = bytearray(path.read_bytes())
    row = tensor.to_numpy()
    at = data.index(bytes(row.view(np.uint8).reshape(-1)[:64]))  # the tensor's first bytes: its first value or scale
    stored = NUMPY.get(kind, np.float16)
    value = np.array([poison], stored).tobytes()
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"'blk\.1\.ffn_down\.weight'.*NaN or infinite value at element 0"):
        gllm.load(path, device="cpu")


@pytest.mark.parametrize("size", [1, 15, 4096, 4097, 10_000])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_first_bad_element_is_found_wherever_it_is(size: int, dtype: str) -> None:
    library = Library()
    for position in {0, size // 2, size - 1}:
        values = np.ones((1, size), NUMPY[dtype])
        values[0, position] = np.nan
        with Uploader(library, 2) as uploader, pytest.raises(ModelFormatError, match=f"at element {position}:"):
            uploader.check_finite({"w": Tensor.from_numpy(values)}, {"w": "name"}, "file", lambda done: None)


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("target", [F32, F16, BF16])
def test_conversion_rounds_to_nearest_even(source: str, target) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((37, 301)) * 10.0 ** rng.integers(-6, 4, (37, 301))).astype(NUMPY[source])
    with Uploader(Library(), 2) as uploader:
        converted = uploader.convert(Tensor.from_numpy(values), target)
    expected = values.astype(np.float32).astype(NUMPY[target.name])
    assert converted.dtype is DTYPES[target.name]
    assert np.array_equal(converted.to_numpy().view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


def test_stored_weights_are_used_where_they_lie(tmp_path: Path) -> None:
    path = to_gguf.convert(ROW, tmp_path / "model.gguf", "q8_0")
    with gllm.load(path, device="cpu") as llm:
        own = llm._engine.weights.tensors["layers.0.gate"]
        assert own.address == llm._checkpoint.tensors["layers.0.gate"].address
