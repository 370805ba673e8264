"""Products of many tokens by warpgroups (wgmma, compute capability 9.0 exactly): flat rows of 16 bits, then tiles.

kernels_cu/common/wgmma_gemm.cuh. Bits differ from the other families', so deterministic mode does not come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..packed_types import PACKED_DTYPES
from . import _products as products
from .base import DeviceProps, Launch, TensorMap, ceil_div

CC = (9, 0)
DTYPES = ("f16", "bf16")
MIN_TOKENS = 65  # fewer fill no tile: mma_gemm's are smaller
ROW_NBYTES = 128  # of a tile in shared memory: 64 elements
PAIR_NBYTES = 8
THREADS = 384
UNPACKED = "f16"  # what packed weights become, whose integers and scales f16 holds
MAX_UNPACKED_NBYTES = 512 << 20  # of one op's weights: scratch that must fit beside the model
UNPACK_THREADS = 128
UNPACK_ARGS = np.dtype([("weight", "<u8"), ("to", "<i8"), ("K", "<i4"), ("code", "<i4")])
BARRIER_NBYTES = 16  # two of a stage, two of the groups


@dataclass(frozen=True)
class WgmmaShape:
    """Tokens by weight rows of a tile, and the stages of its ring."""

    tokens: int
    rows: int
    stages: int

    @property
    def smem_nbytes(self) -> int:
        return self.stages * (self.tokens + self.rows) * ROW_NBYTES + (self.stages + 1) * BARRIER_NBYTES

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.rows}"


LARGE = WgmmaShape(128, 256, 4)
SMALL = WgmmaShape(128, 128, 6)
SHAPES = (LARGE, SMALL)


@dataclass(frozen=True)
class Operands:
    """Weights as products take them, and the launches that make them so."""

    dtype: str
    maps: list[TensorMap]
    launches: list[Launch]


def operands(
    weights: Sequence[tuple[str, int]], widths: Sequence[int], K: int, box_rows: int, scratch_nbytes: int
) -> Operands:
    """Weights (dtype, address) of so many rows: where they lie, or unpacked behind `scratch_nbytes` of scratch."""
    if weights[0][0] not in PACKED_DTYPES:
        maps = [
            TensorMap(weight[1], width, K, weight[0], box_rows) for weight, width in zip(weights, widths, strict=True)
        ]
        return Operands(weights[0][0], maps, [])
    places = [_aligned(scratch_nbytes)]
    for width in widths:
        places.append(_aligned(places[-1] + width * K * 2))
    maps, found = [], []
    for (dtype, address), width, place in zip(weights, widths, places[:-1], strict=True):
        packed = PACKED_DTYPES[dtype]
        args = np.array((address, place, K, packed.code), UNPACK_ARGS)
        symbol = f"pack_weight__unpack_q{packed.bits}"
        found.append(Launch(symbol, (width, 1, 1), (UNPACK_THREADS, 1, 1), 0, places[-1], args=args))
        maps.append(TensorMap(place, width, K, UNPACKED, box_rows, in_workspace=True))
    return Operands(UNPACKED, maps, found)


def fits_unpacked(
    weights: Sequence[tuple[str, int]],
    T: int,
    K: int,
    widths: Sequence[int],
    paired: Iterable[int],
    device: DeviceProps,
    deterministic: bool,
) -> bool:
    """As `fits`, of packed weights that are unpacked first."""
    return (
        all(dtype in PACKED_DTYPES for dtype, _ in weights)
        and sum(widths) * K * 2 <= MAX_UNPACKED_NBYTES
        and fits([(UNPACKED, 0)] * len(weights), T, K, widths, paired, device, deterministic)
    )


def _aligned(nbytes: int) -> int:
    return ceil_div(nbytes, 256) * 256


def fits(
    weights: Sequence[tuple[str, int]],
    T: int,
    K: int,
    widths: Sequence[int],
    paired: Iterable[int],
    device: DeviceProps,
    deterministic: bool,
) -> bool:
    """Whether weights (dtype, address) of row length K can go this way.

    Outputs of these widths, and the f32 arrays at the addresses `paired`, are accessed in pairs.
    """
    return (
        device.cc == CC
        and not deterministic
        and T >= MIN_TOKENS
        and weights[0][0] in DTYPES
        and all(dtype == weights[0][0] and address % 16 == 0 for dtype, address in weights)
        and K % 8 == 0
        and all(width % 2 == 0 for width in widths)
        and all(address % PAIR_NBYTES == 0 for address in paired)
        and max(shape.smem_nbytes for shape in SHAPES) <= device.max_smem_optin
    )


def shape_for(T: int, num_rows: int, device: DeviceProps) -> WgmmaShape:
    """The tile that leaves the fewest multiprocessors without work in the last round, large ones being faster."""

    def cost(shape: WgmmaShape) -> float:
        tiles = ceil_div(T, shape.tokens) * ceil_div(num_rows, shape.rows)
        return ceil_div(tiles, device.num_sms) * shape.rows * (1.15 if shape is SMALL else 1.0)

    return min(SHAPES, key=cost)


def rows_nbytes(T: int, K: int) -> int:
    """Scratch of flat rows, and an f32 for each behind them."""
    return ceil_div(T * K * 2, 256) * 256 + T * 4


def rows(op: str, dtype: str, T: int, workspace_nbytes: int) -> Launch:
    """The kernel that prepares activations, one block per token."""
    threads = (products.ROW_THREADS, 1, 1)
    return Launch(f"{op}__flat_rows_{dtype}", (T, 1, 1), threads, 0, workspace_nbytes, overlaps=True)


def product(
    op: str,
    dtype: str,
    T: int,
    K: int,
    row_tiles: int,
    shape: WgmmaShape,
    weights: Sequence[TensorMap],
    device: DeviceProps,
    workspace_nbytes: int,
    rows_offset: int = 0,
    suffix: str = "",
) -> Launch:
    """Products of flat rows, which lie in the workspace at an offset; `row_tiles` of shape.rows weight rows."""
    activations = TensorMap(rows_offset, T, K, dtype, shape.tokens, in_workspace=True)
    grid = min(device.num_sms, ceil_div(T, shape.tokens) * row_tiles)
    return Launch(
        f"{op}__wgmma_{dtype}_{shape.name}{suffix}",
        (grid, 1, 1),
        (THREADS, 1, 1),
        shape.smem_nbytes,
        workspace_nbytes,
        overlaps=True,
        tensor_maps=(activations, *weights),
    )
