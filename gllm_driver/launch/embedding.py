"""Grids of embedding: a row per block column, 2048 elements per block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..packed_types import PACKED_DTYPES
from .base import DeviceProps, Launch, ceil_div

THREADS = 256
BLOCK_ELEMENTS = 8 * THREADS


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch; nothing for no tokens."""
    grid = (int(a["T"]), ceil_div(int(a["D"]), BLOCK_ELEMENTS), 1)
    kind = "packed" if dtypes["weight"] in PACKED_DTYPES else dtypes["weight"]
    return [Launch(f"embedding__{kind}", grid, (THREADS, 1, 1), overlaps=True)] if 0 not in grid else []
