"""Launches of fused_gate_up_silu: one for few tokens, two for many (norm to 16 bits, then both products)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import _packed as packed
from . import _products as products
from .base import DeviceProps, Launch, ceil_div

OP = "fused_gate_up_silu"


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """Results of a token are the same bits whatever T if `deterministic`."""
    T, D, F = int(a["T"]), int(a["D"]), int(a["F"])
    if not T or not F:
        return []
    weights = [(dtypes[name], int(a[name])) for name in ("gate", "up") if name in dtypes]
    dtype = dtypes["up"]
    units = ceil_div(F, products.TILE_ROWS * (1 if "gate" in dtypes else 2))
    is_mixed = dtypes.get("gate", dtype) != dtype
    if packed.fits(weights, device) and not is_mixed:
        tiles = ceil_div(F, packed.TILE_ROWS // len(weights))
        return packed.products(OP, [packed.bits_of(dtype)], T, D, tiles, device, deterministic)
    if not deterministic and not is_mixed and (dot := products.dot(OP, weights, T, D, units, 2, device)):
        return [dot]
    if is_mixed or not products.on_tensor_cores(weights, D, device):
        scratch = T * D * 4
        return [products.rows(OP, "f32", T, scratch), products.plain(OP, T, F, scratch)]
    if products.takes_gemv(dtype, T, deterministic):
        return [products.gemv(OP, dtype, T, D, units, 2, device, deterministic)]
    scratch = products.prepared_nbytes(T, D)
    return [
        products.rows(OP, products.half_of(dtype), T, scratch),
        products.mma(OP, dtype, T, D, 2 * units, scratch, device),
    ]
