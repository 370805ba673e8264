"""Launches of fused_gate_up_silu: one for few tokens, two for many (norm to 16 bits, then both products)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import _packed as packed
from . import _products as products
from . import _wgmma as wgmma
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
    warpgroups = (wgmma.fits, wgmma.fits_unpacked)[packed.is_packed(dtype)]
    paired = [int(a["out"])]
    if is_for_warpgroups(a, dtypes) and warpgroups(weights, T, D, [F, F], paired, device, deterministic):
        return by_warpgroups(weights, T, D, F, device)
    if packed.fits(weights, device) and not is_mixed:
        tiles = ceil_div(F, packed.TILE_ROWS // len(weights))
        return packed.products(OP, [dtype], T, D, tiles, device, deterministic)
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


def is_for_warpgroups(a: np.ndarray, dtypes: Mapping[str, str]) -> bool:
    """Whether their kernel has the form asked for: with a gate, SiLU or GELU's tanh form, no biases."""
    return "gate" in dtypes and int(a["activation"]) <= 1 and not int(a["up_bias"])


def by_warpgroups(weights: list[tuple[str, int]], T: int, D: int, F: int, device: DeviceProps) -> list[Launch]:
    """Tiles of half gate and half up. Packed weights are unpacked first."""
    shape = wgmma.shape_for(T, 2 * F, device)
    scratch = wgmma.rows_nbytes(T, D)
    ready = wgmma.operands(weights, [F, F], D, shape.rows // 2, scratch)
    row_tiles = ceil_div(F, shape.rows // 2)
    return [
        *ready.launches,
        wgmma.rows(OP, ready.dtype, T, scratch),
        wgmma.product(OP, ready.dtype, T, D, row_tiles, shape, ready.maps, device, scratch),
    ]
