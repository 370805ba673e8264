"""Launches of fused_qkv_rope: norm (many tokens only), products, and `place` where heads are normalized or odd."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import _packed as packed
from . import _products as products
from . import _wgmma as wgmma
from .base import DeviceProps, Launch, ceil_div

OP = "fused_qkv_rope"
UNIT_ROWS = 2 * products.TILE_ROWS
PLACE_THREADS = 128
FINISHED_DIMS = (64, 128)  # sizes of heads that the products of warpgroups can finish
PAIRED = ("q", "kv", "bq", "bk", "bv", "q_norm", "k_norm", "cos_sin")  # read and written in pairs there


def launches(a: np.ndarray, dtypes: Mapping[str, str], device: DeviceProps, deterministic: bool) -> list[Launch]:
    """Results of a token are the same bits whatever T if `deterministic`. One more launch for each further dtype.

    Up to four tokens take one launch for f16 and bf16 together.
    """
    T, D, QD, KD, head_dim = (int(a[dim]) for dim in ("T", "D", "QD", "KD", "Dh"))
    if not T:
        return []
    raw = ceil_div(T * KD * 8, 256) * 256  # k and v before they are placed
    weights = [(dtypes[name], int(a[name])) for name in ("wq", "wk", "wv")]
    kinds = list(dict.fromkeys(dtype for dtype, _ in weights))
    halves = {products.half_of(kind) for kind in kinds}
    place = Launch(
        f"{OP}__place",
        (ceil_div(T * (QD + 2 * KD) // head_dim, PLACE_THREADS // 32), 1, 1),
        (PLACE_THREADS, 1, 1),
        workspace_nbytes=raw,
        overlaps=True,
    )
    units = ceil_div(QD, UNIT_ROWS) + 2 * ceil_div(KD, UNIT_ROWS)
    # the products' epilogue cannot finish such heads
    finish = [place] if int(a["q_norm"]) or int(a["R"]) % 8 or head_dim % UNIT_ROWS else []
    paired = [int(a[name]) for name in PAIRED]
    warpgroups = (wgmma.fits, wgmma.fits_unpacked)[packed.is_packed(weights[0][0])]
    if warpgroups(weights, T, D, [QD, KD, KD], paired, device, deterministic):
        finishes = head_dim in FINISHED_DIMS and (int(a["rope_style"]) == 1 or int(a["R"]) in (0, head_dim // 2))
        product = by_warpgroups(weights, T, D, QD, KD, device, raw, f"_d{head_dim}" if finishes else "")
        return product if finishes else [*product, place]
    if packed.fits(weights, device):
        return packed.products(OP, kinds, T, D, units, device, deterministic, raw) + finish
    if not deterministic and not any(packed.is_packed(kind) for kind in kinds):
        families = dict.fromkeys(map(products.dot_kind, kinds))
        dots = [products.dot(OP, of_family(weights, family), T, D, units, 2, device, raw) for family in families]
        if all(dots):
            return [dot for dot in dots if dot] + finish
    if len(halves) > 1 or not products.on_tensor_cores(weights, D, device):
        scratch = raw + T * D * 4
        return [products.rows(OP, "f32", T, scratch), products.plain(OP, T, QD + 2 * KD, scratch), place]
    if all(products.takes_gemv(kind, T, deterministic) for kind in kinds):
        found = [products.gemv(OP, kind, T, D, units, 2, device, deterministic, raw) for kind in kinds]
    else:
        scratch = raw + products.prepared_nbytes(T, D)
        found = [products.rows(OP, halves.pop(), T, scratch)]
        found += [products.mma(OP, kind, T, D, 2 * units, scratch, device) for kind in kinds]
    return found + finish


def by_warpgroups(
    weights: list[tuple[str, int]], T: int, D: int, QD: int, KD: int, device: DeviceProps, raw: int, suffix: str
) -> list[Launch]:
    """Tiles are of one projection each; `suffix` says whether heads are finished, and of what size they are.

    Packed weights are unpacked first.
    """
    shape = wgmma.shape_for(T, QD + 2 * KD, device)
    widths = (QD, KD, KD)
    row_tiles = sum(ceil_div(width, shape.rows) for width in widths)
    scratch = raw + wgmma.rows_nbytes(T, D)
    ready = wgmma.operands(weights, widths, D, shape.rows, scratch)
    return [
        *ready.launches,
        wgmma.rows(OP, ready.dtype, T, scratch),
        wgmma.product(OP, ready.dtype, T, D, row_tiles, shape, ready.maps, device, scratch, raw, suffix),
    ]


def of_family(weights: list[tuple[str, int]], family: str) -> list[tuple[str, int]]:
    """The weights that one launch of `dot` multiplies."""
    return [weight for weight in weights if products.dot_kind(weight[0]) == family]
