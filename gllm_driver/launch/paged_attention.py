"""Launches of paged_attention: one grid over (spans, heads, sequences)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ._attention import Cache, split_launches
from .base import DeviceProps, Launch


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """None for no sequences. Raises UnsupportedError for a head_dim over 256."""
    cache = Cache.of("paged_attention", a, dtypes, device)
    return split_launches(cache, a, device, deterministic) if cache.S else []
