"""Grids of kv_pages: 16 KiB of a page per block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import MAX_GRID_YZ, DeviceProps, Launch, ceil_div

THREADS = 256
CHUNK_NBYTES = THREADS * 4 * 16


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch, whose blocks take pages in turns beyond the largest grid; nothing for no pages."""
    grid = (ceil_div(int(a["B"]), CHUNK_NBYTES), min(int(a["N"]), MAX_GRID_YZ), 1)
    return [Launch("kv_pages__copy", grid, (THREADS, 1, 1))] if 0 not in grid else []
