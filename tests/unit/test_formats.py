"""Block formats against gguf's own coder, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from gllm_driver.quant.formats import FORMATS
from gllm_driver.types import DTYPES

GGUF_TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def values(name: str) -> np.ndarray:
    g = np.random.Generator(np.random.PCG64(1))
    x = g.standard_normal((5, 3, 128)).astype(np.float32)
    integers = g.integers(-130, 130, (4, 64)).astype(np.float32)
    integers[:, ::32] = 127
    return {
        "normal": x,
        "zero": np.zeros((2, 64), np.float32),
        "large": x * 1e4,
        "tiny": x * 1e-6,
        "below f16": x * 1e-12,
        "ties": integers / 2,
        "equal magnitudes": np.sign(x),
        "one row": x[0, 0, :32],
    }[name]


CASES = ["normal", "zero", "large", "tiny", "below f16", "ties", "equal magnitudes", "one row"]


def test_every_block_dtype_has_a_format() -> None:
    assert set(FORMATS) == {name for name, dtype in DTYPES.items() if dtype.is_quantized} == set(GGUF_TYPES)


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_equals_gguf(name: str, label: str) -> None:
    x = values(label)
    data = FORMATS[name].quantize(x)
    assert data.dtype == np.uint8
    assert np.array_equal(data, gguf.quants.quantize(x, GGUF_TYPES[name]))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_equals_gguf_on_all_bytes(name: str) -> None:
    fmt = FORMATS[name]
    data = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (300, 4 * fmt.block_nbytes)).astype(np.uint8)
    ours = fmt.dequantize(data, (300, 4 * fmt.block_size))
    theirs = gguf.quants.dequantize(data, GGUF_TYPES[name])
    assert ours.dtype == np.float32
    assert np.isnan(ours).any(), "random scales should include NaN"
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 0.51 / 127), ("q4_0", 1.01 / 8)])
def test_round_trip_error_is_a_step(name: str, steps: float) -> None:
    x = values("normal")
    back = FORMATS[name].dequantize(FORMATS[name].quantize(x), x.shape)
    largest = np.abs(x.reshape(-1, 32)).max(axis=1, keepdims=True)
    assert (np.abs(back - x).reshape(-1, 32) <= steps * largest + 1e-3 * largest).all()


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_input_is_named(name: str) -> None:
    fmt = FORMATS[name]
    with pytest.raises(ValueError, match="33 elements are no whole number"):
        fmt.quantize(np.zeros((2, 33), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        fmt.quantize(np.full((1, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"\(2, 32\) needs"):
        fmt.dequantize(np.zeros(5, np.uint8), (2, 32))
    with pytest.raises(ValueError, match="float64"):
        fmt.dequantize(np.zeros(fmt.block_nbytes), (1, 32))
