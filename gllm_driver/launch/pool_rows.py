"""Grids of pool_rows: a thread per piece and column."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import DeviceProps, Launch, ceil_div

THREADS = 128


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch; nothing for no pieces."""
    grid = (int(a["P"]), ceil_div(int(a["D"]), THREADS), 1)
    return [Launch("pool_rows__f32", grid, (THREADS, 1, 1), overlaps=True)] if 0 not in grid else []
