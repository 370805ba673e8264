"""Launches of pack_weight: a block per row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..packed_types import PACKED_DTYPES
from .base import DeviceProps, Launch

THREADS = 256


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """One launch; nothing for no rows."""
    kind = "pack" if dtypes["out"] in PACKED_DTYPES else "convert"
    return [Launch(f"pack_weight__{kind}", (int(a["N"]), 1, 1), (THREADS, 1, 1))] if a["N"] else []
