"""Launches of products with packed weights: one token, few, many (kernels_cu/common/quant_gemv.cuh and quant_mma.cuh).

In deterministic mode every number of tokens takes the kernels of many, whose sums have one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..packed_types import PACKED_DTYPES, SEGMENT
from .base import DeviceProps, Launch, ceil_div

THREADS = 256
WARPS = THREADS // 32
TILE_ROWS = 16
FEW_TOKENS = 8
EXACT_TOKENS = 4  # in two planes of f16, which lose nothing of f32
SLOT_NBYTES = SEGMENT * 2
STATIC_NBYTES = 1024  # the most the kernels have besides
STAGES = {8: 2, 4: 3, 2: 4, 1: 4}
PREFERRED_NBYTES = 112 << 10  # two blocks of a multiprocessor, where the device has so much


def planes_of(T: int) -> int:
    """Slots of a token in the kernels of one and few."""
    return 2 if T <= EXACT_TOKENS else 1


def is_packed(dtype: str) -> bool:
    """Whether `dtype` is a packed type."""
    return dtype in PACKED_DTYPES


def bits_of(dtype: str) -> int:
    """Width of a packed type's integers."""
    return PACKED_DTYPES[dtype].bits


def fits(weights: Sequence[tuple[str, int]], device: DeviceProps) -> bool:
    """Whether tensor cores can take packed weights (dtype, address); the plain kernel takes all."""
    return device.cc >= (8, 0) and all(is_packed(dtype) and address % 16 == 0 for dtype, address in weights)


@dataclass(frozen=True)
class Shape:
    """Tokens by weight rows of a block of quant_mma."""

    tokens: int
    rows: int
    threads: int
    stages: int
    segments: int

    def smem_nbytes(self, bits: int) -> int:
        return self.stages * self.tokens * 128 + self.segments * self.rows // TILE_ROWS * _tile_nbytes(bits)


LARGE = Shape(64, 128, 256, 3, 2)
SMALL = Shape(32, 32, 128, 8, 3)


def products(
    op: str,
    bits: Sequence[int],
    T: int,
    K: int,
    tiles: int,
    device: DeviceProps,
    deterministic: bool,
    workspace_nbytes: int = 0,
) -> list[Launch]:
    """The launches for weights of each of the widths `bits`; `tiles` of sixteen rows, all widths together."""
    if T == 1 and not deterministic:
        return [_gemv(op, "one", width, T, K, tiles, device, workspace_nbytes) for width in bits]
    few = T <= FEW_TOKENS and not deterministic
    planes = planes_of(T) if few else 1
    scratch = workspace_nbytes + ceil_div(K, SEGMENT) * SLOT_NBYTES * T * planes + 4 * T
    found = [Launch(f"{op}__slots_p{planes}", (T, 1, 1), (THREADS, 1, 1), 0, scratch, overlaps=True)]
    for width in bits:
        if few:
            found.append(_gemv(op, "few", width, T, K, tiles, device, scratch))
        else:
            found.append(_mma(op, width, T, tiles, device, scratch))
    return found


def _tile_nbytes(bits: int) -> int:
    """Of a segment of a tile in shared memory: quants, and room for the most scales a row can have."""
    return TILE_ROWS * (32 * bits + 64)


def _gemv(
    op: str, name: str, bits: int, T: int, K: int, tiles: int, device: DeviceProps, workspace_nbytes: int
) -> Launch:
    slots, segments = T * planes_of(T), ceil_div(K, SEGMENT)
    part = TILE_ROWS * (slots + slots % 2) * 4
    ring = WARPS * (STAGES[bits] * _tile_nbytes(bits) + 2 * part)
    each = SLOT_NBYTES * slots  # of shared memory, per segment
    limit = min(device.max_smem_optin - STATIC_NBYTES, max(PREFERRED_NBYTES, ring + each))
    whole = ring + segments * each
    blocks = 2 if 2 * (min(whole, limit) + 2048) <= device.max_smem_optin + 1024 else 1
    grid = ceil_div(tiles, ceil_div(tiles, device.num_sms * blocks))
    smem_nbytes = whole
    if whole > limit:  # panel after panel: sums of the block's tiles wait in shared memory
        kept = ceil_div(tiles, grid) * part
        smem_nbytes = ring + kept + max(1, (limit - ring - kept) // each) * each
    return Launch(
        f"{op}__gemv_q{bits}_{name}", (grid, 1, 1), (THREADS, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True
    )


def _mma(op: str, bits: int, T: int, tiles: int, device: DeviceProps, workspace_nbytes: int) -> Launch:
    blocks = ceil_div(T, LARGE.tokens) * ceil_div(tiles * TILE_ROWS, LARGE.rows)
    fits_large = LARGE.smem_nbytes(bits) <= device.max_smem_optin - STATIC_NBYTES
    shape = LARGE if fits_large and 2 * blocks >= device.num_sms and SMALL.tokens < T else SMALL
    grid = (ceil_div(tiles * TILE_ROWS, shape.rows), ceil_div(T, shape.tokens), 1)
    name = f"{op}__mma_q{bits}_{shape.tokens}x{shape.rows}"
    return Launch(name, grid, (shape.threads, 1, 1), shape.smem_nbytes(bits), workspace_nbytes, overlaps=True)
