"""What ops take of scratch memory on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cpu_backend.workspace import workspace

from ...ops import CONTRACTS


def scratch(op: str, args: np.ndarray, dtypes: Mapping[str, str]) -> tuple[int, int]:
    """Bytes that all threads share, and of each thread's own."""
    return workspace(op, {dim: int(args[dim]) for dim in CONTRACTS[op].dims})
