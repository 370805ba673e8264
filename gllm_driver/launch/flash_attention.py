"""Launches of flash_attention: tiles of query rows, and paged_attention's kernels for sequences with a single query.

Tiles hold rows (token, query head) of one KV head. How many a step has depends on `offsets`, which is on the device;
the grid is the bound that T and S give, and blocks without a tile leave at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..ops import paged_attention
from ._attention import ROWS_WARPS, Cache, rows_smem_nbytes, rows_symbol, split_launches, tile_row_nbytes
from .base import DeviceProps, Launch, ceil_div

STAGES = 2


@dataclass(frozen=True)
class Shape:
    """A tile's shape: FlashShape in kernels_cu/common/attention_tile.cuh."""

    variant: str
    head_dim: int
    rows: int
    warps: int
    keys: int

    @property
    def smem_nbytes(self) -> int:
        """Queries, and for each stage keys and values."""
        return (self.rows + STAGES * 2 * self.keys) * tile_row_nbytes(self.head_dim)

    @property
    def static_smem_nbytes(self) -> int:
        """`located` and `slopes`."""
        return 2 * self.keys * 8 + self.rows * 4


SHAPES = (
    Shape("d64", 64, rows=128, warps=4, keys=32),
    Shape("d80", 80, rows=128, warps=4, keys=32),
    Shape("d96", 96, rows=128, warps=4, keys=32),
    Shape("d128", 128, rows=128, warps=4, keys=32),
    Shape("d256", 256, rows=128, warps=8, keys=32),
    Shape("d256_m64", 256, rows=64, warps=4, keys=16),  # where a block may not have 136 kB of shared memory
)


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """None for no tokens. Raises UnsupportedError for a head_dim over 256."""
    cache = Cache.of("flash_attention", a, dtypes, device)
    found: list[Launch] = []
    if cache.T > 1:  # else no sequence can have two tokens
        found.append(_tiles(cache, device) if cache.tensor_cores else _rows(cache))
    if cache.T == 1 or (cache.T and cache.S > 1):  # else no sequence has one
        found += split_launches(cache, _paged(a), device, deterministic, int(a["offsets"]))
    return found


def _paged(a: np.ndarray) -> np.ndarray:
    """The struct of paged_attention for the same arrays and scalars; its kernels are told `offsets` beside it."""
    struct = paged_attention.CONTRACT.struct
    args = np.zeros((), struct)
    for name in struct.names or ():
        args[name] = a[name]
    return args


def _tiles(cache: Cache, device: DeviceProps) -> Launch:
    shape = next(
        s for s in SHAPES if s.head_dim == cache.Dh and s.smem_nbytes + s.static_smem_nbytes <= device.max_smem_optin
    )
    tiles = ceil_div(cache.T * (cache.H // cache.HK), shape.rows) + cache.S
    symbol = f"{cache.op}__{cache.dtype}_{shape.variant}"
    return Launch(symbol, (tiles * cache.HK, 1, 1), (32 * shape.warps, 1, 1), shape.smem_nbytes)


def _rows(cache: Cache) -> Launch:
    grid = (cache.T, cache.head_groups, 1)
    symbol = rows_symbol("flash_attention__rows", cache.Dh)
    return Launch(symbol, grid, (32 * ROWS_WARPS, 1, 1), rows_smem_nbytes(cache.Dh))
