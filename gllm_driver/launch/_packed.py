"""Launches of products with packed weights: one token, few, many (kernels_cu/common/quant_dot, quant_gemv, quant_mma).

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
DOT_THREADS = 512
DOT_WARPS = DOT_THREADS // 32
DOT_RING_NBYTES = 4 << 10  # of a warp, without scales
DOT_STEP_NBYTES = 512  # of a row, that a warp copies at once
DOT_QUAD_NBYTES = 12  # of four activations: high bytes, low bytes, their sum


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
    dtypes: Sequence[str],
    T: int,
    K: int,
    tiles: int,
    device: DeviceProps,
    deterministic: bool,
    workspace_nbytes: int = 0,
) -> list[Launch]:
    """The launches for weights of `dtypes`, one or more of each width; `tiles` of sixteen rows, all together."""
    bits = list(dict.fromkeys(map(bits_of, dtypes)))
    if T == 1 and not deterministic:
        dots = [_dot(op, width, dtypes, K, tiles * TILE_ROWS, device, workspace_nbytes) for width in bits]
        if all(dots):
            return [dot for dot in dots if dot]
    few = T <= FEW_TOKENS and not deterministic
    planes = planes_of(T) if few else 1
    scratch = workspace_nbytes + ceil_div(K, SEGMENT) * SLOT_NBYTES * T * planes + 4 * T
    found = [Launch(f"{op}__slots_p{planes}", (T, 1, 1), (THREADS, 1, 1), 0, scratch, overlaps=True)]
    for width in bits:
        if few:
            found.append(_gemv(op, width, T, K, tiles, device, scratch))
        else:
            found.append(_mma(op, width, T, tiles, device, scratch))
    return found


def _tile_nbytes(bits: int) -> int:
    """Of a segment of a tile in shared memory: quants, and room for the most scales a row can have."""
    return TILE_ROWS * (32 * bits + 64)


def _dot(
    op: str, bits: int, dtypes: Sequence[str], K: int, num_rows: int, device: DeviceProps, workspace_nbytes: int
) -> Launch | None:
    """One token by those of the weights that are `bits` wide. None: shared memory does not hold so long a row."""
    segments = DOT_STEP_NBYTES * 8 // (SEGMENT * bits)  # of a step
    steps = ceil_div(K, SEGMENT * segments)
    types = [dtype for name in dtypes if (dtype := PACKED_DTYPES[name]).bits == bits]
    scales = max(segments * SEGMENT // dtype.block_size * (4 if dtype.kind else 2) for dtype in types)
    ring = DOT_WARPS * DOT_RING_NBYTES // DOT_STEP_NBYTES * (DOT_STEP_NBYTES + max(16, scales))
    smem_nbytes = ring + steps * segments * (SEGMENT // 4 * DOT_QUAD_NBYTES + 4)
    if smem_nbytes + STATIC_NBYTES > device.max_smem_optin:
        return None
    # More than half of a multiprocessor's, as for float weights (_products.dot).
    smem_nbytes = max(smem_nbytes, device.max_smem_optin // 2 + (1 << 10))
    # Four rows at a time share what is read of activations; of one bit, they would not fit registers.
    rows = 4 if bits > 1 and num_rows >= 3 * device.num_sms * DOT_WARPS else 2
    grid = min(device.num_sms, ceil_div(num_rows, rows))
    return Launch(
        f"{op}__dot_q{bits}_r{rows}", (grid, 1, 1), (DOT_THREADS, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True
    )


def _gemv(op: str, bits: int, T: int, K: int, tiles: int, device: DeviceProps, workspace_nbytes: int) -> Launch:
    slots, segments = T * planes_of(T), ceil_div(K, SEGMENT)
    part = TILE_ROWS * (slots + slots % 2) * 4
    ring = WARPS * (STAGES[bits] * _tile_nbytes(bits) + 2 * part)
    each = SLOT_NBYTES * slots  # of shared memory, per segment
    limit = min(device.max_smem_optin - STATIC_NBYTES, max(PREFERRED_NBYTES, ring + each))
    whole = ring + segments * each
    blocks = 2 if 2 * (min(whole, limit) + 2048) <= device.max_smem_optin + 1024 else 1
    grid = ceil_div(tiles, ceil_div(tiles, device.num_sms * blocks))
    smem_nbytes = whole
    if (
        whole > limit
    ):  # panel after panel: sums of the block's tiles wait in shared memory, so they must not be too many
        room = device.max_smem_optin - STATIC_NBYTES - ring - each
        grid = max(grid, ceil_div(tiles, max(1, room // part)))
        kept = ceil_div(tiles, grid) * part
        smem_nbytes = ring + kept + max(1, (limit - ring - kept) // each) * each
    return Launch(f"{op}__gemv_q{bits}", (grid, 1, 1), (THREADS, 1, 1), smem_nbytes, workspace_nbytes, overlaps=True)


def _mma(op: str, bits: int, T: int, tiles: int, device: DeviceProps, workspace_nbytes: int) -> Launch:
    blocks = ceil_div(T, LARGE.tokens) * ceil_div(tiles * TILE_ROWS, LARGE.rows)
    fits_large = LARGE.smem_nbytes(bits) <= device.max_smem_optin - STATIC_NBYTES
    shape = LARGE if fits_large and 2 * blocks >= device.num_sms and SMALL.tokens < T else SMALL
    grid = (ceil_div(tiles * TILE_ROWS, shape.rows), ceil_div(T, shape.tokens), 1)
    name = f"{op}__mma_q{bits}_{shape.tokens}x{shape.rows}"
    return Launch(name, grid, (shape.threads, 1, 1), shape.smem_nbytes(bits), workspace_nbytes, overlaps=True)
