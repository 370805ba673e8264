"""What the launches of both attention ops share: which kernels fit a cache, and the split of long contexts.

A kernel family ending in `_d<head_dim>` runs on tensor cores and takes 16-bit caches of that head_dim, aligned to 16
bytes, from compute capability 8.0 on. The `rows` kernels take everything else up to head_dim 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedError
from .base import MAX_GRID_YZ, DeviceProps, Launch, ceil_div

TENSOR_CORE_DIMS = (64, 80, 96, 128, 256)
ROWS_DIMS = (128, 256)  # each kernel takes head_dims up to it
# (up to so many keys, a span has at least so many): least_span in kernels_cu/common/attention.cuh
LEAST_SPANS = ((128, 128), (512, 64), (2048, 128), (1 << 31, 256))
MAX_SPLITS = 128  # kMaxSplits
MIN_SPLITS = 4  # of a large batch, so that one long context among short ones is still spread; more cost even ones
GROUP_HEADS = 8  # kGroupHeads
ROWS_WARPS = 4
MERGE_NBYTES = GROUP_HEADS * (MAX_SPLITS + 1) * 4  # kMergeNbytes


@dataclass(frozen=True)
class Cache:
    """The shapes of a call that choose its kernels."""

    op: str
    dtype: str
    T: int
    S: int
    H: int  # query heads
    HK: int
    Dh: int
    table_tokens: int
    tensor_cores: bool

    @classmethod
    def of(cls, op: str, a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps) -> Cache:
        """Raises UnsupportedError for shapes no kernel takes."""
        head_dim, dtype = int(a["Dh"]), dtypes["kv"]
        if head_dim > ROWS_DIMS[-1]:
            raise UnsupportedError(f"{op}: head_dim {head_dim} is over {ROWS_DIMS[-1]}, the most the CUDA kernels take")
        sequences = int(a["S"])
        if sequences > MAX_GRID_YZ:
            raise UnsupportedError(f"{op}: {sequences} sequences in a step, the CUDA kernels take {MAX_GRID_YZ}")
        tensor_cores = (
            dtype in ("f16", "bf16")
            and head_dim in TENSOR_CORE_DIMS
            and device.cc >= (8, 0)
            and int(a["kv"]) % 16 == 0
            and int(a["q"]) % 16 == 0
            and int(a["out"]) % 16 == 0
        )
        return cls(
            op=op,
            dtype=dtype,
            T=int(a["T"]) if op == "flash_attention" else sequences,
            S=sequences,
            H=int(a["QD"]) // head_dim,
            HK=int(a["HK"]),
            Dh=head_dim,
            table_tokens=int(a["MP"]) * int(a["P"]),
            tensor_cores=tensor_cores,
        )

    @property
    def head_groups(self) -> int:
        """Blocks that share a sequence's span: a KV head each, more where it has over GROUP_HEADS query heads."""
        return self.HK * ceil_div(self.H // self.HK, GROUP_HEADS)


def rows_symbol(family: str, head_dim: int) -> str:
    """The kernel of a family that is not on tensor cores."""
    return f"{family}_d{next(d for d in ROWS_DIMS if head_dim <= d)}"


def tile_row_nbytes(head_dim: int) -> int:
    """Bytes of a row of 16-bit elements in a shared-memory tile: TileShape in kernels_cu/common/attention.cuh."""
    return 2 * head_dim + 16


def rows_smem_nbytes(head_dim: int) -> int:
    """WarpParts of the `rows` kernels, or what merging spans takes."""
    return max(ROWS_WARPS * GROUP_HEADS * (2 + head_dim) * 4, MERGE_NBYTES)


def most_spans(num_keys: int) -> int:
    """The most spans that a context of at most `num_keys` is cut into."""
    found, below = 1, 0
    for limit, span in LEAST_SPANS:
        if num_keys > below:
            found = max(found, ceil_div(min(num_keys, limit), span))
        below = limit
    return found


def max_splits(cache: Cache, device: DeviceProps, deterministic: bool) -> int:
    """Into how many spans a sequence's context may be cut.

    Results depend on this number, so in deterministic mode it follows from the model alone: enough for one sequence to
    fill a large device. Otherwise two blocks to a multiprocessor in all, which is what one wave of them reads fastest.
    """
    if deterministic:
        wanted = ceil_div(256, cache.head_groups)
    else:
        wanted = max(MIN_SPLITS, 2 * device.num_sms // (cache.head_groups * max(1, cache.S)))
    return min(MAX_SPLITS, wanted, most_spans(cache.table_tokens))


def split_launches(
    cache: Cache, args: np.ndarray, device: DeviceProps, deterministic: bool, offsets: int = 0
) -> list[Launch]:
    """Attention of the sequences that have one query token; the last block of a group merges its spans.

    `args` is the struct of paged_attention, whose kernels do it; `offsets` the address of the array that says which
    sequences those are, 0 where all are.
    """
    splits = max_splits(cache, device, deterministic)
    parts = cache.S * cache.H * splits
    workspace = ceil_div(parts, 2) * 16 + parts * cache.Dh * 4  # Partials
    if cache.tensor_cores:
        symbol, warps = f"paged_attention__split_{cache.dtype}_d{cache.Dh}", 2 if cache.Dh > 128 else 4
        smem = warps * 2 * 2 * 16 * tile_row_nbytes(cache.Dh)  # stages, keys and values, keys of a tile
    else:
        symbol = rows_symbol("paged_attention__rows_split", cache.Dh)
        warps, smem = ROWS_WARPS, rows_smem_nbytes(cache.Dh)
    grid = (splits, cache.head_groups, cache.S)
    num_counters = cache.head_groups * cache.S
    block = (32 * warps, 1, 1)
    return [Launch(symbol, grid, block, smem, workspace, True, num_counters, addresses=(offsets,), args=args)]
