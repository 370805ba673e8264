"""Test cases of `fused_qkv_rope`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..types import FLOAT_DTYPES
from ._case_tools import Chunk, normal, paged, rng
from .contract import Case

WEIGHTS = ("wq", "wk", "wv")
PREFILL = (Chunk(5), Chunk(1), Chunk(9, 6))
DECODE = (Chunk(1, 7), Chunk(1), Chunk(1, 31))


def _case(
    label: str,
    *,
    chunks: Sequence[Chunk] = PREFILL,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 12,
    pairs: int = 6,
    page_size: int = 4,
    layers: tuple[int, int] = (1, 0),
    style: int = 0,
    bias: bool = False,
    qk_norm: bool = False,
    center: bool = False,
    norm_bias: bool = False,
    shuffled: bool = False,
    factors: tuple[float, float] = (1.0, 1.0),
    storage: Mapping[str, tuple[str, ...]] | None = None,
) -> Case:
    """A step over `chunks`; `layers` is (number, the one written), `factors` scale x and the weights."""
    g = rng("qkv", label)
    num_layers, layer = layers
    cache = paged(
        g,
        chunks,
        page_size=page_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        layer=layer,
        cached=False,
    )
    T, QD, KD = len(cache.positions), heads * head_dim, kv_heads * head_dim
    order = g.permutation(T) if shuffled else np.arange(T)
    angle = cache.positions[order, None] * 1e4 ** -(np.arange(pairs) / max(pairs, 1))
    arrays = {
        "x": normal(g, T, hidden, scale=factors[0]),
        "norm": normal(g, hidden),
        "wq": normal(g, QD, hidden, scale=factors[1] * hidden**-0.5),
        "wk": normal(g, KD, hidden, scale=factors[1] * hidden**-0.5),
        "wv": normal(g, KD, hidden, scale=factors[1] * hidden**-0.5),
        "cos_sin": np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32),
        "positions": cache.positions[order],
        "seq": cache.seq[order],
        "page_table": cache.page_table,
        "kv": cache.kv,
    }
    if bias:
        arrays |= {"bq": normal(g, QD), "bk": normal(g, KD), "bv": normal(g, KD)}
    if norm_bias:
        arrays["norm_bias"] = normal(g, hidden)
    if qk_norm:
        arrays |= {"q_norm": normal(g, head_dim), "k_norm": normal(g, head_dim)}
    scalars = {"layer": layer, "rope_style": style, "eps": 1e-5, "qk_eps": 1e-6, "center": int(center)}
    return Case(label, arrays, scalars, storage or {})


def cases() -> Iterator[Case]:
    """Both rope styles, full and partial; GQA, MQA, MHA; biases; q/k-norm; pages; chunks; values from zero to NaN."""
    yield _case("one", chunks=[Chunk(1)], hidden=1, heads=1, kv_heads=1, head_dim=2, pairs=1, page_size=1)
    for style, name in enumerate(("neox", "interleaved")):
        yield _case(f"{name}-ragged", style=style, hidden=33, head_dim=10, pairs=5)
        yield _case(f"{name}-partial", style=style, head_dim=20, pairs=3)
        yield _case(f"{name}-decode", style=style, chunks=DECODE, hidden=96, page_size=16)
        yield _case(f"{name}-all", style=style, bias=True, qk_norm=True, hidden=96, head_dim=16, pairs=8)
        yield _case(f"{name}-wide", style=style, chunks=DECODE, heads=3, kv_heads=3, head_dim=66, pairs=33)
    yield _case("bias", bias=True, hidden=100, chunks=DECODE)
    yield _case("qk-norm", qk_norm=True, hidden=100, chunks=DECODE, head_dim=33, pairs=16)
    yield _case("no-rotation", pairs=0)
    for chunks, name in ((PREFILL, "prefill"), (DECODE, "decode"), ([Chunk(70, 5)], "long")):
        yield _case(f"center-{name}", chunks=chunks, center=True, pairs=0, head_dim=16, hidden=96)
        yield _case(f"center-bias-{name}", chunks=chunks, center=True, norm_bias=True, bias=True, pairs=0, hidden=100)
        special = _case(f"center-nan-inf-{name}", chunks=chunks, center=True, norm_bias=True, pairs=0, head_dim=16)
        special.arrays["x"][0, 63], special.arrays["x"][-1, 0] = np.nan, np.inf
        yield special
    yield _case("mqa", heads=8, kv_heads=1, head_dim=16, pairs=8)
    yield _case("mha", heads=3, kv_heads=3, page_size=1)
    yield _case("layer-2-of-4", layers=(4, 2), page_size=16)
    yield _case("shuffled", shuffled=True, layers=(2, 1))
    yield _case("blocks-of-256-prefill", hidden=512, bias=True)
    yield _case("blocks-of-256-decode", hidden=256, chunks=DECODE)
    yield _case("long-prefill", chunks=[Chunk(70, 5), Chunk(41)], page_size=16)
    for chunks, name in ((PREFILL, "prefill"), (DECODE, "decode")):
        yield _case(f"zero-{name}", chunks=chunks, factors=(0.0, 1.0), bias=True, qk_norm=True)
        yield _case(f"large-x-{name}", chunks=chunks, factors=(1e6, 1.0))
        yield _case(f"large-w-{name}", chunks=chunks, factors=(1.0, 5e3))
        yield _case(f"tiny-{name}", chunks=chunks, factors=(1e-9, 1e-2))
        mixed = {"wq": ("q4_0",), "wk": ("q8_0",), "wv": ("f16",)}
        yield _case(f"mixed-{name}", chunks=chunks, storage=mixed)
        special = _case(f"nan-inf-x-{name}", chunks=chunks, qk_norm=True)
        special.arrays["x"][1, 63], special.arrays["x"][-1, 0] = np.nan, np.inf
        yield special
        special = _case(f"nan-inf-w-{name}", chunks=chunks, storage=dict.fromkeys(WEIGHTS, FLOAT_DTYPES))
        for weight, row in zip(WEIGHTS, (7, 13, 23), strict=True):
            special.arrays[weight][row, 2 * row] = np.nan  # a row of weights: one dim, and its partner under rotation
        yield special
    overflow = _case("beyond-f16", bias=True)
    overflow.arrays["bk"][[0, 13]], overflow.arrays["bv"][[3, 23]] = (3e6, -3e6), (-3e6, 3e6)
    yield overflow
