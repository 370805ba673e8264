"""Products with stored blocks on the CPU: any bytes, extreme scales, and the same bits in any company."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from cpu_backend.blocks import BlockFormat, block_format
from cpu_backend.kernels import WEIGHT_DTYPES, first_bad_entry
from gllm_driver.quant.formats import FORMATS
from gllm_driver.types import DTYPES, F32, Tensor

BLOCK_DTYPES = [name for name in WEIGHT_DTYPES if name in FORMATS]
SMALLEST, SUBNORMAL, LARGEST = 0x0001, 0x03FF, 0x7BFF  # f16
ROWS = 19


def layout(name: str) -> BlockFormat:
    found = block_format(name)
    assert found is not None
    return found


def columns(name: str) -> int:
    """More than a group of 256 weights, and no whole number of groups where blocks are shorter."""
    return 512 if DTYPES[name].block_size == 256 else 256 + DTYPES[name].block_size


def random_blocks(name: str, halves: list[int]) -> np.ndarray:
    """Rows of random bytes whose f16 numbers are drawn from `halves`, u8 [ROWS, row_nbytes]."""
    g = np.random.default_rng(len(name))
    dtype = DTYPES[name]
    blocks = g.integers(0, 256, (ROWS * columns(name) // dtype.block_size, dtype.block_nbytes), np.uint8)
    for at in layout(name).halves:
        blocks[:, at : at + 2] = g.choice(np.array(halves, "<u2"), len(blocks)).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def product(name: str, x: np.ndarray, weight: np.ndarray, num_threads: int = 1) -> np.ndarray:
    """x [T, K] f32 times the transposed weight, by the op."""
    from cpu_backend.program import run_op

    out = np.full((len(x), ROWS), np.nan, np.float32)
    arrays = {
        "x": Tensor.from_numpy(x),
        "weight": Tensor.from_numpy(weight, DTYPES[name], (ROWS, x.shape[1])),
        "bias": None,
        "residual": None,
        "out": Tensor(out.ctypes.data, out.shape, F32, out),
    }
    run_op("linear", arrays, {}, num_threads=num_threads)
    return out


@pytest.mark.parametrize("name", BLOCK_DTYPES)
@pytest.mark.parametrize(
    "halves", [[0x3C00, 0xB555, 0x2E66], [0, 0x8000], [SMALLEST, SUBNORMAL, 0x8001], [LARGEST, 0xFBFF, 0, SMALLEST]]
)
def test_any_bytes_and_scales(name: str, halves: list[int]) -> None:
    """Integers up to 127 are activations that int8 holds exactly: products are those of float64 but for f32 sums."""
    weight = random_blocks(name, halves)
    x = np.random.default_rng(1).integers(-127, 128, (5, columns(name))).astype(np.float32)
    x[:, ::32] = 127
    values = FORMATS[name].dequantize(weight, (ROWS, columns(name))).astype(np.float64)
    # what is summed: quants times scales, offsets apart
    reach = np.abs(x) @ np.abs(values).T + np.abs(x).sum(axis=1, keepdims=True) * np.abs(values).max()
    actual = product(name, x, weight)
    assert np.isfinite(actual).all()
    error = np.abs(actual - x @ values.T)
    assert not (error > 1e-6 * reach).any(), (error / np.maximum(reach, 1e-300)).max()


@pytest.mark.parametrize("name", BLOCK_DTYPES)
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    weight = random_blocks(name, [0x3C00, 0xB555, 0x2E66])
    x = np.random.default_rng(2).standard_normal((17, columns(name))).astype(np.float32)
    alone = np.concatenate([product(name, row[None], weight) for row in x])
    for tokens in (2, 3, 4, 5, 8, 11, 17):
        assert np.array_equal(product(name, x[:tokens], weight, num_threads=2), alone[:tokens]), tokens


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_bits_of_float_products_do_not_depend_on_the_batch(name: str) -> None:
    g = np.random.default_rng(3)
    x, values = (g.standard_normal((n, 77)).astype(np.float32) for n in (17, ROWS))
    stored = {"f32": values, "f16": values.astype(np.float16), "bf16": values.view(np.uint32) >> 16}[name]
    weight = stored.astype(np.uint16) if name == "bf16" else stored
    raw = np.ascontiguousarray(weight).view(np.uint8)
    alone = np.concatenate([product(name, row[None], raw) for row in x])
    for tokens in (2, 3, 4, 5, 8, 11, 17):
        assert np.array_equal(product(name, x[:tokens], raw, num_threads=2), alone[:tokens]), tokens


@pytest.mark.parametrize("name", BLOCK_DTYPES)
def test_every_scale_is_looked_at(name: str) -> None:
    from cpu_backend.compile import Library

    entry, library = first_bad_entry(name), Library()  # code lives as long as the library
    kinds = [ctypes.c_int64] * 3
    first_bad = ctypes.CFUNCTYPE(*kinds)(library.load([entry])[entry.name])
    dtype = DTYPES[name]
    blocks = random_blocks(name, [0x3C00, LARGEST, SMALLEST, 0]).reshape(-1, dtype.block_nbytes)
    count = len(blocks) * dtype.block_size
    assert first_bad(blocks.ctypes.data, count) == -1
    for at in layout(name).halves:
        for bits in (0x7C00, 0xFC00, 0x7E01):
            for block in (0, len(blocks) // 2, len(blocks) - 1):
                broken = blocks.copy()
                broken[block, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
                assert first_bad(broken.ctypes.data, count) == block * dtype.block_size
