"""Block formats against gguf's own coder, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from gllm_driver.quant.formats import FORMATS, NATIVE_FORMATS, NativeFormat
from gllm_driver.quant.formats.foreign import ForeignFormat
from gllm_driver.types import DTYPES

GGUF_TYPES = {
    name: kind
    for name in FORMATS
    if (kind := getattr(gguf.GGMLQuantizationType, name.upper(), None)) is not None and name != "q1_0"
}
# Formats whose rounding the gguf package also has, so that ours must be the same bit for bit.
SAME_ROUNDING = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
WRITTEN = [name for name, fmt in FORMATS.items() if fmt.can_encode]


def values(name: str) -> np.ndarray:
    g = np.random.Generator(np.random.PCG64(1))
    x = g.standard_normal((5, 3, 256)).astype(np.float32)
    integers = g.integers(-130, 130, (4, 256)).astype(np.float32)
    integers[:, ::32] = 127
    return {
        "normal": x,
        "zero": np.zeros((2, 256), np.float32),
        "large": x * 1e4,
        "tiny": x * 1e-6,
        "below f16": x * 1e-12,
        "ties": integers / 2,
        "equal magnitudes": np.sign(x),
        "one row": x[0, 0],
    }[name]


CASES = ["normal", "zero", "large", "tiny", "below f16", "ties", "equal magnitudes", "one row"]


def test_every_block_dtype_has_a_format() -> None:
    assert set(FORMATS) == {name for name, dtype in DTYPES.items() if dtype.is_quantized}
    assert all(DTYPES[name] is fmt.dtype for name, fmt in FORMATS.items())
    codes = [dtype.code for dtype in DTYPES.values()]
    assert len(set(codes)) == len(codes)
    # codes are part of the kernel ABI: these may never change
    fixed = {"q8_0": 8, "q4_0": 9, "q4_1": 10, "iq4_xs": 19, "int8_32": 20, "int4_128z": 36, "int1_128m": 55}
    assert {name: DTYPES[name].code for name in fixed} == fixed


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_sizes_are_those_of_gguf(name: str) -> None:
    assert (FORMATS[name].block_size, FORMATS[name].block_nbytes) == gguf.GGML_QUANT_SIZES[GGUF_TYPES[name]]


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", SAME_ROUNDING)
def test_quantize_equals_gguf(name: str, label: str) -> None:
    x = values(label)
    data = FORMATS[name].quantize(x)
    assert data.dtype == np.uint8
    assert np.array_equal(data, gguf.quants.quantize(x, GGUF_TYPES[name]))


def blocks_of(name: str, how: str) -> np.ndarray:
    """Random blocks u8 [N, block_nbytes]; `how` says what their f16 scales are."""
    fmt = FORMATS[name]
    data = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (1200, fmt.block_nbytes)).astype(np.uint8)
    bits = {"random": None, "zero": 0, "smallest": 1, "largest": 0x7BFF, "negative": 0xFBFF, "infinite": 0x7C00}[how]
    for offset in fmt.scale_offsets if bits is not None else ():
        data[:, offset], data[:, offset + 1] = bits & 255, bits >> 8
    return data


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("how", ["random", "zero", "smallest", "largest", "negative", "infinite"])
@pytest.mark.parametrize("name", GGUF_TYPES)
def test_dequantize_equals_gguf_on_all_bytes(name: str, how: str) -> None:
    fmt, data = FORMATS[name], blocks_of(name, how)
    ours = fmt.dequantize(data, (300, 4 * fmt.block_size))
    assert ours.dtype == np.float32
    if how in ("random", "infinite") and name != "nvfp4":
        assert not np.isfinite(ours).all(), "such scales should give NaN or infinities"
    assert np.array_equal(ours, gguf.quants.dequantize(data.reshape(300, -1), GGUF_TYPES[name]), equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_bad_blocks_are_found(name: str) -> None:
    fmt, data = FORMATS[name], blocks_of(name, "random")
    bad = ~np.isfinite(fmt.dequantize(data, (1200, fmt.block_size))).all(axis=1)
    found = np.array([fmt.first_bad_block(block) == 0 for block in data])
    assert np.array_equal(found, bad)
    good = data[~bad]
    assert fmt.first_bad_block(good) == -1
    if bad.any():
        assert fmt.first_bad_block(np.concatenate([good[:7], data[bad], good])) == 7


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if not isinstance(f, ForeignFormat)])
def test_planes_say_what_decoding_says(name: str) -> None:
    fmt, data = FORMATS[name], blocks_of(name, "random")
    data = data[~np.array([fmt.first_bad_block(block) == 0 for block in data])]
    planes = fmt.planes(data, (len(data), fmt.block_size))
    groups = planes.scales.shape[1]
    assert fmt.block_size % groups == 0
    expected = np.zeros((len(data), fmt.block_size))
    for group in range(groups):
        part = slice(group * fmt.block_size // groups, (group + 1) * fmt.block_size // groups)
        q = planes.quants[:, part].astype(np.float64)
        if planes.zeros is not None:
            q -= planes.zeros[:, group, None]
        expected[:, part] = q * planes.scales[:, group, None]
        if planes.minimums is not None:
            expected[:, part] += planes.minimums[:, group, None]
    largest = np.abs(expected).max(axis=1, keepdims=True)
    if planes.minimums is not None:
        largest = np.maximum(largest, np.abs(planes.minimums).max(axis=1, keepdims=True))
    assert (np.abs(fmt.dequantize(data, expected.shape) - expected) <= 2.0**-22 * largest).all()


# Root mean square error on normal values, in units of their deviation: the formats' known quality, with little room.
RMSE = {"q4_k": 0.073, "q5_k": 0.0365, "q6_k": 0.018, "q2_k": 0.30, "q3_k": 0.153, "iq4_nl": 0.078, "iq4_xs": 0.081}
RMSE |= {"q8_0": 0.0055, "q4_0": 0.087, "q4_1": 0.079, "q5_0": 0.0435, "q5_1": 0.0385}
RMSE |= {f"int8_{g}{k}": 0.0066 for g in (32, 64, 128) for k in ("", "z", "m")}
RMSE |= {f"int4_{g}{k}": 0.105 for g in (32, 64, 128) for k in ("", "z", "m")}
RMSE |= {f"int2_{g}{k}": 0.56 for g in (32, 64, 128) for k in ("", "z", "m")}
RMSE |= {f"int1_{g}{k}": 0.61 for g in (32, 64, 128) for k in ("", "z", "m")}


@pytest.mark.parametrize("name", WRITTEN)
def test_round_trip_error(name: str) -> None:
    x = np.random.Generator(np.random.PCG64(3)).standard_normal((64, 1024)).astype(np.float32)
    fmt = FORMATS[name]
    for factor in (1.0, 1e-2, 3e3):
        back = fmt.dequantize(fmt.quantize(x * np.float32(factor)), x.shape) / factor
        assert np.sqrt(np.square(back - x, dtype=np.float64).mean()) < RMSE[name]


@pytest.mark.parametrize("label", CASES)
@pytest.mark.parametrize("name", WRITTEN)
def test_rounding_stays_within_the_range(name: str, label: str) -> None:
    """No block comes back far outside the values that went in, whatever they are."""
    x = values(label)
    back = FORMATS[name].dequantize(FORMATS[name].quantize(x), x.shape)
    largest = np.abs(x.reshape(-1, 256)).max(axis=1, keepdims=True)
    assert (np.abs(back).reshape(-1, 256) <= 1.5 * largest + 1e-6).all()


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 0.51 / 127), ("q4_0", 1.01 / 8)])
def test_round_trip_error_is_a_step(name: str, steps: float) -> None:
    x = values("normal")
    back = FORMATS[name].dequantize(FORMATS[name].quantize(x), x.shape)
    largest = np.abs(x.reshape(-1, 32)).max(axis=1, keepdims=True)
    assert (np.abs(back - x).reshape(-1, 32) <= steps * largest + 1e-3 * largest).all()


def native_value(fmt: NativeFormat, block: np.ndarray, j: int) -> float:
    """Element j of one block, from the description alone."""
    d, a = block[: fmt.header_nbytes].view("<f2").astype(float).tolist() + [0.0] * (2 - fmt.header_nbytes // 2)
    data, nbytes = block[fmt.header_nbytes :], fmt.block_size * fmt.bits // 8
    if fmt.bits == 1:
        q = int(data[j // 8]) >> j % 8 & 1
    else:
        q = int(data[j % nbytes]) >> fmt.bits * (j // nbytes) & (1 << fmt.bits) - 1
    if fmt.kind == "z":
        return d * (q - a)
    if fmt.kind == "m":
        return d * q + a
    if fmt.bits == 8:
        return d * (q - 256 if q > 127 else q)
    return d * (q - 8) if fmt.bits == 4 else d * (2 * q - ((1 << fmt.bits) - 1))


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_native_formats_are_as_described(name: str) -> None:
    fmt, g = NATIVE_FORMATS[name], np.random.Generator(np.random.PCG64(4))
    data = g.integers(0, 256, (20, fmt.block_nbytes)).astype(np.uint8)
    data[:, : fmt.header_nbytes] = g.standard_normal((20, fmt.header_nbytes // 2)).astype("<f2").view(np.uint8)
    expected = [[native_value(fmt, block, j) for j in range(fmt.block_size)] for block in data]
    assert np.allclose(fmt.dequantize(data, (20, fmt.block_size)), expected, rtol=1e-6, atol=1e-6)
    extras = data[:, 2:4].copy().view("<f2").astype(np.float32) if fmt.kind else None
    assert np.array_equal(fmt.pack(fmt.stored_quants(data), data[:, :2].copy().view("<f2"), extras), data)


@pytest.mark.parametrize(("native", "ggml"), [("int8_32", "q8_0"), ("int4_32", "q4_0"), ("int4_32m", "q4_1")])
def test_three_native_formats_are_ggml_ones_byte_for_byte(native: str, ggml: str) -> None:
    x = values("normal")
    data = FORMATS[ggml].quantize(x)
    assert np.array_equal(FORMATS[native].quantize(x), data)
    assert np.array_equal(FORMATS[native].dequantize(data, x.shape), FORMATS[ggml].dequantize(data, x.shape))


@pytest.mark.parametrize("name", NATIVE_FORMATS)
def test_native_rounding_is_to_the_nearest_level(name: str) -> None:
    """Of the levels that the stored scale gives, no other one is closer by more than the scale's own rounding."""
    fmt, x = NATIVE_FORMATS[name], values("normal").reshape(-1, 128)
    data = fmt.quantize(x)
    blocks = data.reshape(-1, fmt.block_nbytes)
    top = (1 << fmt.bits) - 1
    stored = np.arange(
        -128 if fmt.bits == 8 and not fmt.kind else 0, 128 if fmt.bits == 8 and not fmt.kind else top + 1
    )
    levels = np.stack(
        [
            fmt.dequantize(
                fmt.pack(
                    np.full((len(blocks), fmt.block_size), q),
                    blocks[:, :2].copy().view("<f2"),
                    blocks[:, 2:4].copy().view("<f2") if fmt.kind else None,
                ),
                (len(blocks), fmt.block_size),
            )
            for q in stored
        ]
    )
    parts = x.reshape(-1, fmt.block_size)
    best = np.abs(levels - parts).min(axis=0)
    off = np.abs(fmt.dequantize(blocks, parts.shape) - parts)
    assert (off <= best + 2e-3 * np.abs(parts).max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("name", WRITTEN)
def test_wrong_input_is_named(name: str) -> None:
    fmt = FORMATS[name]
    with pytest.raises(ValueError, match="33 elements are no whole number"):
        fmt.quantize(np.zeros((2, 33), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        fmt.quantize(np.full((1, 256), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"\(2, 256\) needs"):
        fmt.dequantize(np.zeros(5, np.uint8), (2, 256))
    with pytest.raises(ValueError, match="float64"):
        fmt.dequantize(np.zeros(fmt.block_nbytes), (1, fmt.block_size))
    with pytest.raises(ValueError, match="overflow f16"):
        fmt.quantize(np.linspace(-1e30, 1e30, 256, dtype=np.float32)[None])


def test_formats_that_are_only_read_say_so() -> None:
    for name in set(FORMATS) - set(WRITTEN):
        with pytest.raises(ValueError, match=f"{name} is only read"):
            FORMATS[name].quantize(np.zeros((1, 256), np.float32))
    with pytest.raises(ValueError, match="iq1_s is only decoded"):
        FORMATS["iq1_s"].planes(np.zeros(50, np.uint8), (1, 256))
