"""Launch arithmetic: which kernels an op's call runs, on what grid. One module per op; integers only, no CUDA here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import numpy as np

from ..packed_types import packed_dtype
from ..types import FLOAT_DTYPES
from ..types import WEIGHT_DTYPES as STORED_DTYPES
from .base import DeviceProps, Launch

__all__ = ["WEIGHT_DTYPES", "DeviceProps", "Launch", "launches"]

# Types of stored weights that a device computes with: floats, and block formats by way of a packed type.
WEIGHT_DTYPES: tuple[str, ...] = tuple(d for d in STORED_DTYPES if d in FLOAT_DTYPES or packed_dtype(d))


def launches(
    op: str, args: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool = True
) -> list[Launch]:
    """The launches of one bound call, in stream order.

    `args` is what `CONTRACTS[op].bind` returned; `dtypes` names the element type of every array given. `Launch.params`
    says what a kernel takes.
    """
    module = importlib.import_module(f"{__name__}.{op}")
    found: list[Launch] = module.launches(args, dtypes, device, deterministic)
    return found
