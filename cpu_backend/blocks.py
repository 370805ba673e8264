"""Block formats as data: where in a group of 256 weights each eight of them lie, and where their scales are.

Kernels work on groups of 256 weights: 8 sub-blocks of 32, s = 0 … 7, in pieces of 8, j = 0 … 3. A piece is eight
neighbouring bytes of the file, shifted and masked (`Plane`), or eight bits of one (`BitPlane`); a weight is the sum of
its planes, perhaps looked up in a table. Its value is scale · (q − zero_point) + offset.

The layouts are those of gllm_driver/quant/formats (GGUF's types as ggml defines them, and the native blocks).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

GROUP = 256  # weights handled together
SUB_BLOCK = 32  # as many activations share a scale
PIECES = [(s, j) for j in range(4) for s in range(8)]


@dataclass(frozen=True)
class Plane:
    """Some bits of every weight. `place(s, j)` gives (byte offset in the group, shift) of a piece's eight bytes."""

    bits: int
    place: Callable[[int, int], tuple[int, int]]
    left: int = 0  # position of these bits in the weight


@dataclass(frozen=True)
class BitPlane:
    """One bit of every weight, packed: `place(s)` is the offset of four bytes, bit i of byte j for weight 8j + i."""

    place: Callable[[int], int]
    left: int = 0


@dataclass(frozen=True)
class HalfScales:
    """f16 numbers per block: d at `scale`, perhaps a at `offset`; value d·q, d·q + a or d·(q − a)."""

    scale: int = 0
    offset: int | None = None
    kind: str = ""  # "m": minimum added, "z": zero point subtracted
    factor: int = 1  # of d


@dataclass(frozen=True)
class Field:
    """Small integers packed in a few bytes: lane i is (byte[index[i]] >> shift[i]) & mask[i], shifted left."""

    index: tuple[int, ...]
    shift: tuple[int, ...]
    mask: tuple[int, ...]
    left: int = 0


@dataclass(frozen=True)
class PackedScales:
    """Scales of a super-block: d · (integer − bias), the integers unpacked from 16 bytes at `at`; likewise minimums.

    16 integers: scales of 16 weights each. With `minimum_at` (offset of dmin) and 8 sub-blocks, lanes 0–7 are scales
    and 8–15 minimums of 32 weights; `minimums` unpacks 16 minimums of 16 weights instead.
    """

    at: int
    fields: tuple[Field, ...]
    scale: int
    bias: int = 0
    signed: bool = False  # the bytes themselves are the integers
    per: int = 32
    minimum_at: int | None = None
    minimums: tuple[Field, ...] = ()


@dataclass(frozen=True)
class BlockFormat:
    """A stored block format as kernels see it."""

    block_size: int
    block_nbytes: int
    planes: tuple[Plane | BitPlane, ...]
    scales: HalfScales | PackedScales
    zero_point: int = 0
    signed: bool = False  # the one plane holds signed bytes
    table: tuple[int, ...] = field(default=())  # 16 signed values to look weights up in

    @property
    def group_nbytes(self) -> int:
        return GROUP // self.block_size * self.block_nbytes if self.block_size < GROUP else self.block_nbytes

    @property
    def greatest(self) -> int:
        """The greatest q as unsigned bytes."""
        if self.signed or self.table:
            return 255
        return sum((((1 << p.bits) - 1) if isinstance(p, Plane) else 1) << p.left for p in self.planes)

    @property
    def halves(self) -> tuple[int, ...]:
        """Offsets in a block of its f16 numbers."""
        second = self.scales.offset if isinstance(self.scales, HalfScales) else self.scales.minimum_at
        return (self.scales.scale,) if second is None else (self.scales.scale, second)


def _in_blocks(block_size: int, block_nbytes: int, header: int, bits: int) -> Callable[[int, int], tuple[int, int]]:
    """Blocks whose weights lie in planes of block_size·bits/8 bytes, lowest bits first."""
    span = block_size * bits // 8

    def place(s: int, j: int) -> tuple[int, int]:
        block, at = divmod(SUB_BLOCK * s + 8 * j, block_size)
        plane, byte = divmod(at, span)
        return block * block_nbytes + header + byte, bits * plane

    return place


def _native(bits: int, block_size: int, kind: str) -> BlockFormat:
    header = 4 if kind else 2
    nbytes = header + block_size * bits // 8
    place = _in_blocks(block_size, nbytes, header, bits)
    offset = 2 if kind else None
    if kind == "" and bits == 8:
        return BlockFormat(block_size, nbytes, (Plane(8, place),), HalfScales(), signed=True)
    if kind == "" and bits <= 2:  # d·(2q − greatest): ±d, or ±d and ±3d
        plane = _bits_of_blocks(block_size, nbytes, header, 1) if bits == 1 else Plane(2, place, left=1)
        return BlockFormat(block_size, nbytes, (plane,), HalfScales(), zero_point=(1 << bits) - 1)
    plane = _bits_of_blocks(block_size, nbytes, header, 0) if bits == 1 else Plane(bits, place)
    return BlockFormat(
        block_size, nbytes, (plane,), HalfScales(offset=offset, kind=kind), zero_point=0 if kind else 1 << bits - 1
    )


def _bits_of_blocks(block_size: int, block_nbytes: int, header: int, left: int) -> BitPlane:
    return BitPlane(
        lambda s: SUB_BLOCK * s // block_size * block_nbytes + header + SUB_BLOCK * s % block_size // 8, left
    )


def _repeat(*runs: tuple[int, int]) -> tuple[int, ...]:
    return tuple(value for value, count in runs for _ in range(count))


def _chunks(at: int, bits: int, sub_blocks: int) -> Callable[[int, int], tuple[int, int]]:
    """Super-blocks whose runs of 32 bytes at `at` hold `sub_blocks` sub-blocks each, lowest bits first."""
    return lambda s, j: (at + 32 * (s // sub_blocks) + 8 * j, bits * (s % sub_blocks))


# lanes 0–7: scales, 8–15: minimums, 6 bits each, in 12 bytes behind d and dmin
_SCALES_K4 = (
    Field(
        (*range(4, 8), *range(12, 16), *range(8, 12), *range(12, 16)),
        _repeat((0, 12), (4, 4)),
        _repeat((63, 4), (15, 4), (63, 4), (15, 4)),
    ),
    Field(
        (*range(4, 8), *range(4, 8), *range(8, 12), *range(8, 12)),
        (6,) * 16,
        _repeat((0, 4), (3, 4), (0, 4), (3, 4)),
        4,
    ),
)
# 16 scales of 6 bits: low nibbles in 8 bytes, then two bits each in 4 bytes; the 16 bytes read start 2 before them
_SCALES_Q3 = (
    Field((*range(2, 10), *range(2, 10)), _repeat((0, 8), (4, 8)), (15,) * 16),
    Field((*range(10, 14),) * 4, _repeat((0, 4), (2, 4), (4, 4), (6, 4)), (3,) * 16, 4),
)
_IQ4_SCALES = (
    Field(tuple(4 + s // 2 for s in range(8)) * 2, tuple(4 * (s % 2) for s in range(8)) * 2, (15,) * 16),
    Field(tuple(2 + s // 4 for s in range(8)) * 2, tuple(2 * (s % 4) for s in range(8)) * 2, (3,) * 16, 4),
)
_ALL = tuple(range(16))
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _q6_low(s: int, j: int) -> tuple[int, int]:
    half, t = divmod(s, 4)
    return 64 * half + 32 * (t % 2) + 8 * j, t // 2 * 4


_NAMED = {
    "q8_0": _native(8, 32, ""),
    "q4_0": _native(4, 32, ""),
    "q4_1": _native(4, 32, "m"),
    "q5_0": BlockFormat(
        32, 22, (Plane(4, _in_blocks(32, 22, 6, 4)), BitPlane(lambda s: 22 * s + 2, 4)), HalfScales(), zero_point=16
    ),
    "q5_1": BlockFormat(
        32, 24, (Plane(4, _in_blocks(32, 24, 8, 4)), BitPlane(lambda s: 24 * s + 4, 4)), HalfScales(offset=2, kind="m")
    ),
    "iq4_nl": BlockFormat(32, 18, (Plane(4, _in_blocks(32, 18, 2, 4)),), HalfScales(), table=_IQ4_VALUES),
    "q2_k": BlockFormat(
        256,
        84,
        (Plane(2, _chunks(16, 2, 4)),),
        PackedScales(
            0,
            (Field(_ALL, (0,) * 16, (15,) * 16),),
            80,
            per=16,
            minimum_at=82,
            minimums=(Field(_ALL, (4,) * 16, (15,) * 16),),
        ),
    ),
    "q3_k": BlockFormat(
        256,
        110,
        (Plane(2, _chunks(32, 2, 4)), Plane(1, _chunks(0, 1, 8), left=2)),
        PackedScales(94, _SCALES_Q3, 108, bias=32, per=16),
        zero_point=4,
    ),
    "q4_k": BlockFormat(256, 144, (Plane(4, _chunks(16, 4, 2)),), PackedScales(0, _SCALES_K4, 0, minimum_at=2)),
    "q5_k": BlockFormat(
        256,
        176,
        (Plane(4, _chunks(48, 4, 2)), Plane(1, _chunks(16, 1, 8), left=4)),
        PackedScales(0, _SCALES_K4, 0, minimum_at=2),
    ),
    "q6_k": BlockFormat(
        256,
        210,
        (Plane(4, _q6_low), Plane(2, _chunks(128, 2, 4), left=4)),
        PackedScales(192, (), 208, signed=True, per=16),
        zero_point=32,
    ),
    "iq4_xs": BlockFormat(
        256,
        136,
        (Plane(4, _in_blocks(32, 16, 8, 4)),),
        PackedScales(0, _IQ4_SCALES, 0, bias=32),
        table=_IQ4_VALUES,
    ),
}


@functools.cache
def block_format(name: str) -> BlockFormat | None:
    """The format of this name, None if kernels cannot multiply with it."""
    if native := re.fullmatch(r"int([1248])_(32|64|128)([zm]?)", name):
        return _native(int(native[1]), int(native[2]), native[3])
    return _NAMED.get(name)
