"""Packed weights: the layout in numpy against stored blocks, and what the simulated device packs against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_runner import direct
from op_memory import Placed

from gllm_driver.ops._case_tools import rng
from gllm_driver.packed_types import PACKED_BITS, PACKED_DTYPES, SEGMENT, packed_dtype
from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.packed import Parts, field_places, pack, pack_parts, unpack
from gllm_driver.types import DTYPES, Tensor

STORED = [name for name in DTYPES if packed_dtype(name) is not None]
# Scales that packing rounds to f16, and how many integer steps a weight is at most away from 0.
ROUNDED = {"q2_k": 3 + 1, "q3_k": 4, "q4_k": 15 + 1, "q5_k": 31 + 1, "q6_k": 32, "iq4_xs": 127}
SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,)}  # where blocks have f16 numbers, if not in front


def f16_places(stored: str) -> tuple[int, ...]:
    dtype = packed_dtype(stored)
    assert dtype is not None
    return SCALES.get(stored, (0, 2) if dtype.kind else (0,))


def random_blocks(stored: str, N: int, K: int, key: object = None) -> np.ndarray:
    """Any bytes with finite scales, u8 [N, row_nbytes]; some blocks are zero all over."""
    g, dtype = rng("blocks", stored, N, K, key), DTYPES[stored]
    raw = g.integers(0, 256, (N, K // dtype.block_size, dtype.block_nbytes), np.uint8)
    for at in f16_places(stored):
        raw[:, :, at : at + 2] = g.standard_normal((*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
    raw[g.random(raw.shape[:2]) < 0.1] = 0
    return raw.reshape(N, -1)


def test_every_element_has_a_place_of_its_own() -> None:
    for bits in PACKED_BITS:
        word, field = field_places(bits).T
        assert sorted(word * 32 // bits + field) == list(range(SEGMENT))
        assert len(set(zip(word, field, strict=True))) == SEGMENT


def test_rows_are_aligned_and_wide_enough() -> None:
    for dtype in PACKED_DTYPES.values():
        for K in (dtype.block_size, 128, 256, 384, 4096):
            if K % dtype.block_size == 0:
                assert dtype.row_nbytes(K) % 32 == 0
                assert dtype.row_nbytes(K) >= K // dtype.block_size * dtype.block_nbytes
    with pytest.raises(ValueError, match="no whole number"):
        PACKED_DTYPES["p4_64"].row_nbytes(96)
    assert len({d.code for d in (*PACKED_DTYPES.values(), *DTYPES.values())}) == len(PACKED_DTYPES) + len(DTYPES)
    assert PACKED_DTYPES["p4_32"].row_nbytes(4096) == 2048 + 256


@pytest.mark.parametrize("stored", STORED)
def test_packing_keeps_every_weight(stored: str) -> None:
    """Exactly, but for the scales of K-quants, which are products rounded to f16."""
    N, dtype = 5, packed_dtype(stored)
    assert dtype is not None
    for K in (256, 768) if DTYPES[stored].block_size == 256 else (128, 384, 640):
        raw = random_blocks(stored, N, K)
        expected = FORMATS[stored].dequantize(raw, (N, K)).astype(np.float64)
        packed = pack(raw, stored, (N, K))
        assert packed.shape == (N, dtype.row_nbytes(K))
        error = np.abs(unpack(packed, dtype, (N, K)) - expected).reshape(N, -1, dtype.block_size).max(axis=2)
        if stored in ROUNDED:
            step = np.abs(unpack_scales(packed, stored, N, K))
            assert (error <= 2**-11 * ROUNDED[stored] * step + 2**-20).all()
            assert error.max() > 0
        else:
            assert error.max() <= 2**-22 * np.abs(expected).max()  # the stored format's own decode rounds to f32


def unpack_scales(packed: np.ndarray, stored: str, N: int, K: int) -> np.ndarray:
    """The largest of a group's f16 numbers, in magnitude: f64 [N, groups]."""
    dtype = packed_dtype(stored)
    assert dtype is not None
    each, count = 2 if dtype.kind else 1, K // dtype.block_size
    start = dtype.quants_nbytes(K)
    halves = np.ascontiguousarray(packed[:, start : start + 2 * each * count]).view(np.float16)
    return np.abs(halves.astype(np.float64)).reshape(N, count, each).max(axis=2)


def packed_on_device(raw: np.ndarray, stored: str, N: int, K: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    dtype = packed_dtype(stored)
    assert dtype is not None
    source = Placed(raw.reshape(-1), DTYPES[stored], (N, K), shift)
    out = Placed.unwritten(dtype, (N, K), 0)
    bad = Placed.unwritten(DTYPES["i32"], (N,), 0)
    tensors: dict[str, Tensor | None] = {"raw": source.tensor, "out": out.tensor, "bad": bad.tensor}
    direct()("pack_weight", tensors, {})
    for name, place in (("raw", source), ("out", out), ("bad", bad)):
        place.check_guards(name)
    source.check_unchanged("raw")
    return out.data.reshape(N, -1), bad.data.view(np.int32)


@pytest.mark.hostsim
@pytest.mark.parametrize("stored", STORED)
def test_the_device_packs_like_numpy(stored: str) -> None:
    for N, K, shift in ((1, 256, 0), (3, 768, 1), (2, 9 * 256, 3)) + (
        () if DTYPES[stored].block_size > 128 else ((4, 128, 2), (3, 384, 0))
    ):
        raw = random_blocks(stored, N, K, shift)
        packed, bad = packed_on_device(raw, stored, N, K, shift)
        assert np.array_equal(packed, pack(raw, stored, (N, K))), (stored, N, K)
        assert (bad == -1).all()


@pytest.mark.hostsim
@pytest.mark.parametrize("stored", STORED)
def test_scales_that_are_no_numbers_are_found_in_their_rows(stored: str) -> None:
    N, K = 4, 1024
    block, group = DTYPES[stored].block_size, packed_dtype(stored)
    assert group is not None
    raw = random_blocks(stored, N, K).reshape(N, K // block, -1)
    for row, index, bits in ((1, 0, 0x7E00), (1, K // block - 1, 0x7C00), (3, K // block - 1, 0xFC00)):
        for at in f16_places(stored)[-1:]:
            raw[row, index, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
        raw[row, index, :at] |= 0x11  # no factor beside the scale is 0 all over
        raw[row, index, at + 2 :] |= 0x11
    packed, bad = packed_on_device(raw.reshape(N, -1), stored, N, K)
    values = unpack(packed, group, (N, K))
    expected = np.where(~np.isfinite(values).all(axis=1), (~np.isfinite(values)).argmax(axis=1), -1)
    assert expected[0] == expected[2] == -1
    assert 0 <= expected[1] < block
    assert K - block <= expected[3]
    assert np.array_equal(bad, expected)


def test_the_extremes_of_every_packed_type() -> None:
    g = rng("extremes")
    for dtype in PACKED_DTYPES.values():
        N, K = 3, 384
        u = g.choice([0, (1 << dtype.bits) - 1], (N, K)).astype(np.uint8)
        scales = g.choice(np.array([0, 6e-8, -6e-8, 65504, -65504, 1], np.float16), (2, N, K // dtype.block_size))
        parts = Parts(u, scales[0], scales[1] if dtype.kind else np.zeros_like(scales[1]))
        values = unpack(pack_parts(parts, dtype), dtype, (N, K))
        d, a = (np.repeat(s.astype(np.float64), dtype.block_size, axis=1) for s in (parts.d, parts.a))
        v = u.astype(np.float64)
        q = v - (1 << (dtype.bits - 1)) if dtype.bits >= 4 else 2 * v - ((1 << dtype.bits) - 1)
        expected = {"": d * q, "z": d * (v - a), "m": d * v + a}[dtype.kind]
        assert np.array_equal(values, expected), dtype
