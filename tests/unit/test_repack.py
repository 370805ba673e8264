"""Weights in types that a backend does not compute: where they go, and that nothing is lost on the way."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.repack import PIECE_ELEMENTS, BadWeights, repack, repacked_dtype
from gllm_driver.types import DTYPES, FLOAT_DTYPES, Tensor

BASIC = (*FLOAT_DTYPES, "q8_0", "q4_0")
EVERYTHING_32 = (*BASIC, "q4_1", "q5_0", "q5_1", "int8_32m")
NAMES = [name for name in FORMATS if name not in BASIC]


def stored(name: str, rows: int = 4, row: int = 512, scale: float = 0.01) -> tuple[Tensor, np.ndarray]:
    """A tensor of random blocks with sound scales, and its values."""
    fmt, g = FORMATS[name], np.random.Generator(np.random.PCG64(1))
    data = g.integers(0, 256, (rows * row // fmt.block_size, fmt.block_nbytes)).astype(np.uint8)
    for offset in fmt.scale_offsets:
        data[:, offset : offset + 2] = (scale * g.standard_normal((len(data), 1))).astype("<f2").view(np.uint8)
    if name == "iq1_m":
        data[:, 49:56:2] &= 0x2F  # the nibbles of its scale
    if name == "mxfp4":
        data[:, 0] = g.integers(110, 130, len(data))
    if name.endswith("z"):
        zeros = g.integers(4, 12, (len(data), 1)) if fmt.block_nbytes < 100 else np.full((len(data), 1), 8)
        if name.startswith("int8"):
            zeros[:] = 128
        data[:, 2:4] = zeros.astype("<f2").view(np.uint8)
    data = data.reshape(rows, -1)
    return Tensor.from_numpy(data, DTYPES[name], (rows, row)), fmt.dequantize(data, (rows, row))


def values(tensor: Tensor) -> np.ndarray:
    if tensor.dtype.is_quantized:
        return FORMATS[tensor.dtype.name].dequantize(tensor.to_numpy(), tensor.shape)
    return tensor.to_numpy().astype(np.float32)


@pytest.mark.parametrize("computed", [BASIC, EVERYTHING_32])
@pytest.mark.parametrize("name", NAMES)
def test_values_survive(name: str, computed: tuple[str, ...]) -> None:
    tensor, expected = stored(name)
    assert np.isfinite(expected).all()
    moved = repack(tensor, computed, workers=2)
    assert moved.dtype.name in computed
    assert moved.shape == tensor.shape
    if not name.endswith("z"):  # zero points decide
        assert moved.dtype is repacked_dtype(tensor.dtype, computed)
    if moved.dtype.is_quantized:
        assert np.array_equal(values(moved), expected)
    else:
        assert np.array_equal(values(moved), expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("q5_0", "q8_0"),
        ("iq4_nl", "q8_0"),
        ("tq1_0", "q4_0"),
        ("tq2_0", "q4_0"),
        ("mxfp4", "q8_0"),
        ("int8_64", "q8_0"),
        ("int4_128", "q4_0"),
        ("int2_64", "q4_0"),
        ("int1_128", "q4_0"),
        ("int4_128z", "q8_0"),
        ("int4_128m", "f16"),
        ("q4_1", "f16"),
        ("q4_k", "f16"),
        ("q6_k", "f16"),
        ("iq2_xs", "f16"),
        ("nvfp4", "f16"),
    ],
)
def test_the_nearest_type_is_taken(name: str, target: str) -> None:
    assert repack(stored(name)[0], BASIC).dtype.name == target


def test_more_computed_types_mean_smaller_ones() -> None:
    assert repack(stored("int4_128z")[0], EVERYTHING_32).dtype.name == "q5_0"
    assert repack(stored("int4_128z")[0], BASIC).dtype.name == "q8_0"
    assert repacked_dtype(DTYPES["int4_64m"], EVERYTHING_32).name == "q4_1"
    assert repacked_dtype(DTYPES["int8_128m"], EVERYTHING_32).name == "int8_32m"


def test_types_of_the_same_bytes_are_not_copied() -> None:
    for name, other in (("int8_32", "q8_0"), ("int4_32", "q4_0"), ("q4_1", "int4_32m")):
        tensor = stored(name)[0]
        moved = repack(tensor, (*BASIC, "int4_32m"))
        assert (moved.dtype.name, moved.address) == (other, tensor.address)
    tensor = stored("q8_0")[0]
    assert repack(tensor, BASIC) is tensor


@pytest.mark.parametrize("zero", [3.5, 200.0])
def test_zero_points_that_need_a_float(zero: float) -> None:
    tensor, _ = stored("int8_64z")
    data = tensor.to_numpy().reshape(-1, 68)
    data[5, 2:4] = np.array([zero], "<f2").view(np.uint8)
    moved = repack(tensor, BASIC)
    assert moved.dtype.name == "f16"
    expected = FORMATS["int8_64z"].dequantize(tensor.to_numpy(), tensor.shape).astype(np.float16)
    assert np.array_equal(moved.to_numpy(), expected)


def test_values_beyond_f16_become_bf16() -> None:
    tensor, expected = stored("q6_k", scale=30.0)
    assert np.abs(expected).max() > 65504
    moved = repack(tensor, BASIC)
    assert moved.dtype.name == "bf16"
    assert np.array_equal(moved.to_numpy(), expected.astype(ml_dtypes.bfloat16))
    assert repack(tensor, BASIC, "f32").dtype.name == "f32"
    assert np.array_equal(values(repack(tensor, BASIC, "f32")), expected)


@pytest.mark.parametrize("exponent", [60, 160])
def test_small_and_large_scales_of_mxfp4_become_bf16(exponent: int) -> None:
    tensor, _ = stored("mxfp4")
    tensor.to_numpy().reshape(-1, 17)[3, 0] = exponent
    moved = repack(tensor, BASIC)
    assert moved.dtype.name == "bf16"
    assert np.array_equal(values(moved), FORMATS["mxfp4"].dequantize(tensor.to_numpy(), tensor.shape))


@pytest.mark.parametrize("name", ["q4_k", "q5_0", "iq2_xxs", "int4_64z", "int2_32m"])
def test_bad_scales_are_found_where_they_are(name: str) -> None:
    rows = PIECE_ELEMENTS // 512 + 5  # two pieces
    tensor, _ = stored(name, rows)
    fmt = FORMATS[name]
    blocks = tensor.to_numpy().reshape(-1, fmt.block_nbytes)
    blocks[-2, fmt.scale_offsets[-1] : fmt.scale_offsets[-1] + 2] = (0x00, 0x7E)  # NaN
    with pytest.raises(BadWeights) as caught:
        repack(tensor, BASIC, workers=2)
    assert caught.value.element == (len(blocks) - 2) * fmt.block_size


def test_several_pieces_join() -> None:
    tensor, expected = stored("q5_0", PIECE_ELEMENTS // 512 * 2 + 3)
    assert np.array_equal(values(repack(tensor, BASIC, workers=2)), expected)
