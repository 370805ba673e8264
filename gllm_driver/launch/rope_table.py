"""Grids of rope_table: a thread per token and pair."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .base import DeviceProps, Launch, ceil_div

THREADS = 128


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch; nothing for no tokens."""
    blocks = ceil_div(int(a["T"]) * int(a["R"]), THREADS)
    return [Launch("rope_table__f64", (blocks, 1, 1), (THREADS, 1, 1), overlaps=True)] if blocks else []
