"""The PTX wrappers against numpy: data movement exactly, tensor cores within rounding. Also meant for real GPUs."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from wrapper_kernels import conformance_cubin

from gllm_driver.driver.device import Device
from gllm_driver.driver.launch import PackedParams

Run = Callable[..., list[np.ndarray]]
SEEDS = range(3)


@pytest.fixture
def run(device: Device) -> Run:
    """run(kernel, threads, inputs, outputs, *numbers): inputs go up, the struct of addresses and numbers is passed."""
    module = device.load(conformance_cubin(device.cc), "conformance")
    stream = device.stream()

    def launch(
        kernel: str, threads: int, inputs: list[np.ndarray], outputs: list[np.ndarray], *numbers: int, grid: int = 1
    ) -> list[np.ndarray]:
        buffers = [device.alloc(a.nbytes) for a in (*inputs, *outputs)]
        for array, buffer in zip((*inputs, *outputs), buffers, strict=True):
            device.copy_h2d(buffer.address, array.ctypes.data, array.nbytes)
        fields = [("", "<i8")] * len(buffers) + [("", "<i4")] * len(numbers)
        struct = np.array((*[b.address for b in buffers], *numbers), np.dtype(fields, align=True))
        function = module.function(f"conformance__{kernel}")
        function.launch((grid, 1, 1), (threads, 1, 1), 0, stream, PackedParams(struct))
        stream.synchronize()
        for array, buffer in zip(outputs, buffers[len(inputs) :], strict=True):
            device.copy_d2h(array.ctypes.data, buffer.address, array.nbytes)
        return outputs

    return launch


# ---- fragments, from the PTX ISA: thread l holds rows l / 4 (and + 8), columns 2 (l % 4) + {0, 1} (and + 8)


def fragments_a(a: np.ndarray) -> np.ndarray:
    """[16, 16] of 16 bits → [32, 4] words."""
    out = np.zeros((32, 4, 2), a.dtype)
    for lane in range(32):
        for register, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            c = lane % 4 * 2 + column
            out[lane, register] = a[lane // 4 + row, c : c + 2]
    return out.reshape(32, 8).view(np.uint32)


def fragments_b(b: np.ndarray) -> np.ndarray:
    """[16, 8] of 16 bits → [32, 2] words."""
    out = np.zeros((32, 2, 2), b.dtype)
    for lane in range(32):
        for register, row in enumerate((0, 8)):
            r = lane % 4 * 2 + row
            out[lane, register] = b[r : r + 2, lane // 4]
    return out.reshape(32, 4).view(np.uint32)


def fragments_c(c: np.ndarray) -> np.ndarray:
    """[16, 8] f32 → [32, 4]."""
    out = np.zeros((32, 4), np.float32)
    for lane in range(32):
        for register in range(4):
            out[lane, register] = c[lane // 4 + register // 2 * 8, lane % 4 * 2 + register % 2]
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("kernel", "dtype"), [("mma_f16", np.float16), ("mma_bf16", ml_dtypes.bfloat16)])
def test_mma(run: Run, kernel: str, dtype: type, seed: int) -> None:
    g = np.random.default_rng(seed)
    a, b = g.standard_normal((16, 16)).astype(dtype), g.standard_normal((16, 8)).astype(dtype)
    c = g.standard_normal((16, 8)).astype(np.float32)
    if seed == 0:  # small integers are exact in any order
        a, b = g.integers(-8, 9, a.shape).astype(dtype), g.integers(-8, 9, b.shape).astype(dtype)
        c = g.integers(-99, 99, c.shape).astype(np.float32)
    inputs = [fragments_a(a), fragments_b(b), fragments_c(c)]
    (d,) = run(kernel, 32, inputs, [np.zeros((32, 4), np.float32)])
    exact = a.astype(np.float64) @ b.astype(np.float64) + c
    error = np.abs(d - fragments_c(exact)).max()
    assert error <= (0 if seed == 0 else 2e-6 * 16)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(run: Run, transposed: bool, seed: int) -> None:
    g = np.random.default_rng(seed)
    memory = g.integers(0, 2**32, 512, dtype=np.uint32)
    rows = (g.permutation(128)[:32] * 16).astype(np.int32)
    kernel = "ldmatrix_trans" if transposed else "ldmatrix"
    (out,) = run(kernel, 32, [memory, rows], [np.zeros((32, 4), np.uint32)])
    matrices = np.stack([memory.view(np.uint16)[r // 2 : r // 2 + 8] for r in rows]).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    expected = np.zeros((32, 4, 2), np.uint16)
    for lane in range(32):
        expected[lane] = matrices[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
    assert np.array_equal(out, expected.reshape(32, 8).view(np.uint32))


@pytest.mark.parametrize("num_valid", [0, 1, 95, 96, 97, 191, 200, 287, 288])
def test_cp_async(run: Run, num_valid: int) -> None:
    source = np.random.default_rng(num_valid).integers(1, 2**32, (288, 4), dtype=np.uint32)
    (out,) = run("cp_async", 96, [source], [np.zeros((288, 4), np.uint32)], num_valid)
    expected = np.where(np.arange(288)[:, None] < num_valid, source, 0).reshape(3, 96, 4)[:, ::-1]
    assert np.array_equal(out.reshape(3, 96, 4), expected)


@pytest.mark.parametrize("argument", [0, 1, 2, 5, 16, 31])
def test_shuffles(run: Run, argument: int) -> None:
    v = np.random.default_rng(argument).integers(-999, 999, 32, dtype=np.int32)
    (out,) = run("shuffles", 32, [v], [np.zeros((8, 32), np.int32)], argument)
    lanes = np.arange(32)
    assert (out[0] == v[argument]).all()
    assert np.array_equal(out[1], v[lanes ^ argument])
    assert np.array_equal(out[2], v[np.where(lanes >= argument, lanes - argument, lanes)])
    assert np.array_equal(out[3], v[np.where(lanes + argument < 32, lanes + argument, lanes)])
    assert np.array_equal(out[4], v[lanes // 8 * 8 + argument % 8])
    votes = sum(1 << lane for lane in range(32) if v[lane] > 0)
    assert (out[5].view(np.uint32) == votes).all()
    assert (out[6] == 0).all()
    assert (out[7] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_reductions(run: Run, seed: int) -> None:
    v = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    if seed == 1:
        v[7] = np.nan
    (out,) = run("reductions", 32, [v], [np.zeros((2, 32), np.float32)])
    tree, lanes = v.copy(), np.arange(32)
    for offset in (16, 8, 4, 2, 1):
        tree = tree + tree[lanes ^ offset]
    assert np.array_equal(out[0], tree, equal_nan=True)  # one order, so the same bits
    assert (out[1] == np.nanmax(v)).all()  # a NaN loses to any number


@pytest.mark.parametrize("seed", SEEDS)
def test_byte_products(run: Run, seed: int) -> None:
    g = np.random.default_rng(seed)
    a, b = g.integers(0, 256, (2, 32, 4), dtype=np.uint8)
    c = g.integers(-(2**20), 2**20, 32, dtype=np.int32)
    (out,) = run("byte_products", 32, [a, b, c], [np.zeros((2, 32), np.int32)])
    for row, bytes_of_b in zip(out, (b.view(np.int8), b), strict=True):
        assert np.array_equal(row, (a.astype(int) * bytes_of_b).sum(axis=1) + c)


def test_named_barriers(run: Run) -> None:
    v = np.random.default_rng(0).integers(0, 1000, 128, dtype=np.int32)
    (out,) = run("named_barrier", 128, [v], [np.zeros(128, np.int32)])
    mirrored = v.reshape(2, 64)[:, ::-1].reshape(128) + 1
    assert np.array_equal(out, mirrored[::-1])


def test_conversions(run: Run) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4001, dtype=np.uint32)
    v = bits.view(np.float32)
    v[:9] = [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 6e-8, 1e-45]
    v[9:13] = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8]  # ties go to even
    out, back = np.zeros((2, v.size), np.uint16), np.zeros((2, v.size), np.float32)
    run("convert", 64, [v], [out, back], v.size, grid=5)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
            expected = v.astype(dtype)
            is_nan = np.isnan(v)
            assert np.array_equal(out[row][~is_nan], expected.view(np.uint16)[~is_nan])
            assert np.array_equal(back[row], expected.astype(np.float32), equal_nan=True)
            assert np.isnan(back[row][is_nan]).all()
