"""Packed weights in numpy: what op `pack_weight` makes on the device, slow and plain, for tests and for reading.

`split` takes stored blocks apart into unsigned integers and f16 scales, `pack` lays those out as packed_types.py says,
`unpack` gives back the values that product kernels multiply with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..packed_types import SEGMENT, PackedDType, packed_dtype


class Parts(NamedTuple):
    """The integers and scales of a matrix. Rows of `u` are elements in order, rows of `d` and `a` groups in order."""

    u: np.ndarray  # [N, K] u8
    d: np.ndarray  # [N, K / group_size] f16
    a: np.ndarray  # the same; zeros for kind ""


def field_places(bits: int) -> np.ndarray:
    """Where the elements of a segment lie: (index of 32-bit word, index of field in it) of each, [256, 2]."""
    element = np.arange(SEGMENT)
    stretch, lane, within = element // 16, element % 16 // 4, element % 4
    per_word, per_piece = 32 // bits, min(4, 2 * bits)  # fields, words
    of_lane = 4 * stretch + within
    word, place = of_lane // per_word, of_lane % per_word
    at = (word // per_piece * 4 + lane) * per_piece + word % per_piece
    return np.stack([at, place % 2 * (per_word // 2) + place // 2], axis=1)


def pack(raw: np.ndarray, stored: str, shape: tuple[int, int]) -> np.ndarray:
    """Stored bytes of a matrix [N, K] → packed rows, u8 [N, row_nbytes]. ValueError for types that are not packed."""
    dtype = packed_dtype(stored)
    if dtype is None:
        raise ValueError(f"{stored} is not packed: only block formats are")
    return pack_parts(split(raw, stored, shape), dtype)


def pack_parts(parts: Parts, dtype: PackedDType) -> np.ndarray:
    """Integers and scales → packed rows, u8 [N, row_nbytes]."""
    N, K = parts.u.shape
    segments, groups = -(-K // SEGMENT), SEGMENT // dtype.block_size
    u = np.full((N, segments * SEGMENT), 1 << (dtype.bits - 1), np.uint32)
    u[:, :K] = parts.u
    word, field = field_places(dtype.bits).T
    words = np.zeros((N, segments, SEGMENT * dtype.bits // 32), np.uint32)
    fields = u.reshape(N, segments, SEGMENT) << (field * dtype.bits).astype(np.uint32)
    for i in range(words.shape[2]):
        words[:, :, i] = np.bitwise_or.reduce(fields[:, :, word == i], axis=2)
    scales = np.zeros((N, segments * groups, 2 if dtype.kind else 1), np.float16)
    scales[:, : parts.d.shape[1], 0] = parts.d
    if dtype.kind:
        scales[:, : parts.d.shape[1], 1] = parts.a
    out = np.zeros((N, dtype.row_nbytes(K)), np.uint8)
    start = dtype.quants_nbytes(K)
    out[:, :start] = words.reshape(N, -1).view(np.uint8)
    out[:, start : start + scales.nbytes // N] = scales.reshape(N, -1).view(np.uint8)
    return out


def unpack(packed: np.ndarray, dtype: PackedDType, shape: tuple[int, ...]) -> np.ndarray:
    """Packed rows (u8) → the weights they stand for, float64 of `shape`. ValueError when the sizes differ."""
    N, K = int(np.prod(shape[:-1])), shape[-1]
    nbytes = dtype.row_nbytes(K)
    if packed.dtype != np.uint8 or packed.size != N * nbytes:
        raise ValueError(f"{dtype.name} {shape} needs {N * nbytes} bytes as uint8, got {packed.size} of {packed.dtype}")
    rows = np.ascontiguousarray(packed).reshape(N, nbytes)
    start, segments, groups = dtype.quants_nbytes(K), -(-K // SEGMENT), SEGMENT // dtype.block_size
    words = np.ascontiguousarray(rows[:, :start]).view(np.uint32).reshape(N, segments, -1)
    word, field = field_places(dtype.bits).T
    u = words[:, :, word] >> (field * dtype.bits).astype(np.uint32) & np.uint32((1 << dtype.bits) - 1)
    count = segments * groups * (2 if dtype.kind else 1)
    scales = np.ascontiguousarray(rows[:, start : start + 2 * count]).view(np.float16).reshape(N, segments * groups, -1)
    d = np.repeat(scales[:, :, 0].astype(np.float64), dtype.block_size, axis=1)
    u = u.reshape(N, -1).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a scale that is no number makes weights that are none
        if not dtype.kind:
            values = d * (u - (1 << (dtype.bits - 1)) if dtype.bits >= 4 else 2 * u - ((1 << dtype.bits) - 1))
        else:
            a = np.repeat(scales[:, :, 1].astype(np.float64), dtype.block_size, axis=1)
            values = d * (u - a) if dtype.kind == "z" else d * u + a
    return values[:, :K].reshape(shape)


def split(raw: np.ndarray, stored: str, shape: tuple[int, int]) -> Parts:
    """Stored bytes of a matrix [N, K] → the integers and f16 scales of its packed form."""
    from ..types import DTYPES

    dtype = packed_dtype(stored)
    assert dtype is not None, stored
    N, _ = shape
    blocks = np.ascontiguousarray(raw).reshape(-1, DTYPES[stored].block_nbytes)
    with np.errstate(over="ignore", invalid="ignore"):
        u, d, a = _SPLITTERS[stored](blocks) if stored in _SPLITTERS else _native(blocks, dtype)
    u = u.astype(np.uint8).reshape(N, -1)
    d = d.astype(np.float16).reshape(N, -1)
    return Parts(u, d, np.zeros_like(d) if a is None else a.astype(np.float16).reshape(N, -1))


Split = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]  # u, d, a of blocks, in f32 or integers


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte `at` of each block, as f32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """[N, n] bytes → their fields, the lowest ones of all bytes first: [N, n · 8 / bits]."""
    mask = np.uint8((1 << bits) - 1)
    return np.concatenate([data >> np.uint8(shift) & mask for shift in range(0, 8, bits)], axis=1)


def _bits(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(data, axis=1, bitorder="little")


def _native(blocks: np.ndarray, dtype: PackedDType) -> Split:
    d, a = _f16(blocks, 0), _f16(blocks, 2) if dtype.kind else None
    data = np.ascontiguousarray(blocks[:, 4 if dtype.kind else 2 :])
    if dtype.bits == 1:
        return _bits(data), d, a
    if dtype.bits == 8 and not dtype.kind:
        return data ^ np.uint8(0x80), d, a
    return _fields(data, dtype.bits), d, a


def _q8_0(blocks: np.ndarray) -> Split:
    return blocks[:, 2:] ^ np.uint8(0x80), _f16(blocks, 0), None


def _q4_0(blocks: np.ndarray) -> Split:
    return _fields(blocks[:, 2:], 4), _f16(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> Split:
    return _fields(blocks[:, 4:], 4), _f16(blocks, 0), _f16(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Split:
    q = _fields(blocks[:, 6:], 4) | _bits(blocks[:, 2:6]) << np.uint8(4)
    return q + np.uint8(128 - 16), _f16(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> Split:
    return _fields(blocks[:, 8:], 4) | _bits(blocks[:, 4:8]) << np.uint8(4), _f16(blocks, 0), _f16(blocks, 2)


def _halves(data: np.ndarray, half: int, bits: int) -> np.ndarray:
    """Fields of a block of 256 whose halves (or quarters) of `half` bytes hold consecutive elements each."""
    return _fields(data.reshape(-1, half), bits).reshape(len(data), -1)


def _q2_k(blocks: np.ndarray) -> Split:
    scales, d, least = blocks[:, :16], _f16(blocks, 80), _f16(blocks, 82)
    return _halves(blocks[:, 16:80], 32, 2), d * (scales & 15), -(least * (scales >> 4))


def _q3_k(blocks: np.ndarray) -> Split:
    high = _fields(blocks[:, :32], 1)  # bit b of byte l belongs to element 32 b + l
    low, packed = _halves(blocks[:, 32:96], 32, 2), blocks[:, 96:108]
    scales = _fields(packed[:, :8], 4) | _fields(packed[:, 8:], 2) << np.uint8(4)
    return (low | high << np.uint8(2)) + np.uint8(4), _f16(blocks, 108) * (scales.astype(np.float32) - 32), None


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minima of q4_k and q5_k, eight each, from 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = [first & 63, rest & 15 | first >> 6 << np.uint8(4)]
    minima = [second & 63, rest >> 4 | second >> 6 << np.uint8(4)]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _q4_k(blocks: np.ndarray) -> Split:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    return _halves(blocks[:, 16:], 32, 4), _f16(blocks, 0) * scales, -(_f16(blocks, 2) * minima)


def _q5_k(blocks: np.ndarray) -> Split:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    q = _halves(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 1) << np.uint8(4)
    return q, _f16(blocks, 0) * scales, -(_f16(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> Split:
    q = _halves(blocks[:, :128], 64, 4) | _halves(blocks[:, 128:192], 32, 2) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return q + np.uint8(128 - 32), _f16(blocks, 208) * scales, None


# The sixteen values of iq4_nl and iq4_xs.
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4_nl(blocks: np.ndarray) -> Split:
    return NONLINEAR.view(np.uint8)[_fields(blocks[:, 2:], 4)] ^ np.uint8(0x80), _f16(blocks, 0), None


def _iq4_xs(blocks: np.ndarray) -> Split:
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> (2 * np.arange(8)).astype(np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = (low | high << 4).astype(np.float32) - 32
    u = NONLINEAR.view(np.uint8)[_halves(blocks[:, 8:], 16, 4)] ^ np.uint8(0x80)
    return u, _f16(blocks, 0) * scales, None


_SPLITTERS: dict[str, Callable[[np.ndarray], Split]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
