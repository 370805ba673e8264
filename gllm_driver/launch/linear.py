"""Launches of linear: one for few tokens, two for many (activations to 16 bits, then the product)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import _packed as packed
from . import _products as products
from . import _wgmma as wgmma
from .base import DeviceProps, Launch, ceil_div


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """Results of a token are the same bits whatever T if `deterministic`."""
    T, K, N, dtype = int(a["T"]), int(a["K"]), int(a["N"]), dtypes["weight"]
    if not T or not N:
        return []
    weights = [(dtype, int(a["weight"]))]
    paired = [int(a[name]) for name in ("out", "bias", "residual")]
    warpgroups = (wgmma.fits, wgmma.fits_unpacked)[packed.is_packed(dtype)]
    if warpgroups(weights, T, K, [N], paired, device, deterministic):
        return by_warpgroups(weights, T, K, N, device)
    if packed.fits(weights, device):
        tiles = ceil_div(N, packed.TILE_ROWS)
        return packed.products("linear", [dtype], T, K, tiles, device, deterministic)
    tiles = ceil_div(N, products.TILE_ROWS)
    if not deterministic and (dot := products.dot("linear", weights, T, K, tiles, 1, device)):
        return [dot]
    if not products.on_tensor_cores(weights, K, device):
        return [products.plain("linear", T, N)]
    if products.takes_gemv(dtype, T, deterministic):
        return [products.gemv("linear", dtype, T, K, tiles, 1, device, deterministic)]
    scratch = products.prepared_nbytes(T, K)
    return [
        products.rows("linear", products.half_of(dtype), T, scratch),
        products.mma("linear", dtype, T, K, tiles, scratch, device),
    ]


def by_warpgroups(weights: list[tuple[str, int]], T: int, K: int, N: int, device: DeviceProps) -> list[Launch]:
    """Packed weights are unpacked first."""
    shape = wgmma.shape_for(T, N, device)
    scratch = wgmma.rows_nbytes(T, K)
    ready = wgmma.operands(weights, [N], K, shape.rows, scratch)
    return [
        *ready.launches,
        wgmma.rows("linear", ready.dtype, T, scratch),
        wgmma.product("linear", ready.dtype, T, K, ceil_div(N, shape.rows), shape, ready.maps, device, scratch),
    ]
