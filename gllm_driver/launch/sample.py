"""Grids of sample: one block per row for small vocabularies, four kernels for large ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import DeviceProps, Launch, ceil_div

CHOOSE_THREADS = 1024
SCAN_THREADS = 256
TILE = 16 * SCAN_THREADS  # tokens of a row a block takes at a time
MAX_BLOCKS = 256  # per row
ROW_SCRATCH_NBYTES = 61_456  # sizeof(RowScratch) in kernels_cu/sample.cu
SPLIT_FROM = 16_384  # vocabulary size from which several blocks per row pay for three more launches


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch or four; nothing for no rows. Only the vocabulary decides: params may change between replays."""
    rows, vocab_size = int(a["S"]), int(a["V"])
    if not rows:
        return []
    block = (CHOOSE_THREADS, 1, 1)
    if vocab_size < SPLIT_FROM:
        return [Launch("sample__row", (rows, 1, 1), block, overlaps=True)]
    split = (min(ceil_div(vocab_size, TILE), MAX_BLOCKS), rows, 1)
    nbytes = rows * ROW_SCRATCH_NBYTES
    return [
        *(
            Launch(f"sample__{n}", split, (SCAN_THREADS, 1, 1), 0, nbytes, overlaps=True)
            for n in ("scan", "histogram", "collect")
        ),
        Launch("sample__choose", (rows, 1, 1), block, 0, nbytes, overlaps=True),
    ]
