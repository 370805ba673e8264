"""Attention over a paged cache from its definition, and the test cases both attention ops share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ._case_tools import Chunk, Paged, normal, paged, rng
from .contract import Case


def alibi_slopes(num_heads: int, max_bias: float) -> np.ndarray:
    """Slope of each query head, f64 [H]: attention with linear biases (Press et al. 2022).

    2^(−max_bias · (h + 1) / n) for the first n heads, n being the greatest power of two in num_heads; further heads
    take every other slope of 2n heads, from the first on. 0 for a max_bias of 0.
    """
    n = 1 << (num_heads.bit_length() - 1)
    heads = np.arange(num_heads)
    exponent = np.where(heads < n, (heads + 1) / n, (2 * (heads - n) + 1) / (2 * n))
    return np.exp2(-max_bias * exponent) * (max_bias > 0)


def attend(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float], seq: np.ndarray) -> np.ndarray:
    """out [T, QD]: query t of sequence seq[t] over the tokens it sees, gathered one by one through the page table."""
    kv, page_table, positions = arrays["kv"], arrays["page_table"], arrays["positions"]
    kv_heads, page_size, head_dim = kv.shape[3:]
    queries = arrays["q"].reshape(len(arrays["q"]), kv_heads, -1, head_dim)
    layer, window = int(scalars["layer"]), int(scalars.get("window", 0))
    slopes = alibi_slopes(queries.shape[1] * queries.shape[2], scalars.get("alibi_max_bias", 0.0))
    slopes = slopes.reshape(*queries.shape[1:3], 1)
    out = np.empty_like(queries)
    for t, position in enumerate(positions):
        seen = np.arange(max(0, position - window + 1) if window else 0, position + 1)
        pages, rows = page_table[seq[t], seen // page_size], seen % page_size
        keys, values = kv[pages, layer, 0, :, rows], kv[pages, layer, 1, :, rows]  # [n, HK, Dh]
        with np.errstate(invalid="ignore"):
            scores = np.einsum("hgd,nhd->hgn", queries[t], keys) * scalars["scale"]
            scores += slopes * (seen - position)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[t] = np.einsum("hgn,nhd->hgd", weights, values)
    return out.reshape(arrays["q"].shape)


def attention_case(
    op: str,
    label: str,
    chunks: Sequence[Chunk],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 20,
    page_size: int = 4,
    window: int = 0,
    alibi: float = 0.0,
    layers: tuple[int, int] = (1, 0),
    q_scale: float = 1.0,
    kv_scale: float = 1.0,
    condition: float = 1.0,
) -> tuple[Case, Paged]:
    """A case over chunks (for paged_attention each has one token), `layers` being (number, the one used)."""
    g = rng(op, label)
    num_layers, layer = layers
    cache = paged(
        g,
        chunks,
        page_size=page_size,
        kv_heads=kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        layer=layer,
        scale=kv_scale,
    )
    q = normal(g, len(cache.positions), heads * head_dim, scale=q_scale)
    arrays = {"q": q, "kv": cache.kv, "page_table": cache.page_table, "positions": cache.positions}
    if op == "flash_attention":
        arrays["offsets"] = cache.offsets
    scalars = {"layer": layer, "window": window, "scale": head_dim**-0.5, "alibi_max_bias": alibi}
    return Case(label, arrays, scalars, condition=condition), cache


def shared_cases(op: str, chunks: Sequence[Chunk]) -> Iterator[Case]:
    """Shapes, windows and values over one batch of chunks, whose sequence 1 must have at least 30 tokens."""

    def case(label: str, **options: object) -> Case:
        return attention_case(op, label, chunks, **options)[0]  # type: ignore[arg-type]

    for page_size in (1, 4, 16):
        yield case(f"page-{page_size}", page_size=page_size)
        for window in (1, 5, 16, 23, 10_000):
            yield case(f"page-{page_size}-window-{window}", page_size=page_size, window=window)
    for heads, kv_heads, head_dim in (
        (1, 1, 8),
        (3, 3, 33),
        (8, 1, 64),
        (6, 2, 100),
        (4, 4, 128),
        (14, 2, 16),
        (2, 1, 1),
    ):
        yield case(f"heads-{heads}-{kv_heads}-{head_dim}", heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    yield case("layer-1-of-3", layers=(3, 1))
    yield case("layer-2-of-3", layers=(3, 2), window=9, page_size=16)
    for heads, kv_heads in ((1, 1), (3, 1), (8, 8), (12, 4)):
        for window in (0, 11):
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 16, "window": window}
            yield case(f"alibi-{heads}-{kv_heads}-window-{window}", alibi=8.0, **shape)
    yield case("alibi-steep", alibi=0.5, heads=6, head_dim=33, page_size=16)
    yield case("alibi-flat", alibi=30.0, heads=6, q_scale=3.0, condition=10.0)
    yield case("zero", q_scale=0.0, kv_scale=0.0)
    yield case("uniform", q_scale=0.0)
    yield case("large-v", kv_scale=1e4, q_scale=1e-4)
    yield case("sharp", q_scale=30.0, kv_scale=10.0, condition=300.0)
    yield case("tiny", q_scale=1e-5, kv_scale=1e-4)
    yield from _drifting(op, chunks)
    yield from _special(op, chunks)


def _drifting(op: str, chunks: Sequence[Chunk]) -> Iterator[Case]:
    """Scores that rise, fall or jump with the position, so that an online softmax must rescale again and again."""
    for label, score in (
        ("rising", lambda p: 2.0 * p),
        ("falling", lambda p: -2.0 * p),
        ("jump", lambda p: 200.0 if p == 25 else 0.0),
        ("drop", lambda p: -1e4 if p < 20 else 0.0),
    ):
        case, cache = attention_case(op, label, chunks, head_dim=16, condition=100.0)
        case.arrays["q"][:] = 1
        for s, chunk in enumerate(chunks):
            for p in range(chunk.total):
                _slot(cache, s, p)[0] = score(p) / 4  # q·k · 16^-0.5 = score
        yield case


def _special(op: str, chunks: Sequence[Chunk]) -> Iterator[Case]:
    """NaN and infinities reach the queries that see them, in their heads, and nothing else."""
    for window, alibi in ((0, 0.0), (6, 0.0), (0, 8.0)):
        label = f"nan-inf-cache-window-{window}-alibi-{alibi:g}"
        case, cache = attention_case(op, label, chunks, window=window, alibi=alibi)
        last = chunks[1].total - 1
        _slot(cache, 1, last - 3)[0, 0, 7] = np.nan  # a key: its head's outputs
        _slot(cache, 1, last - 1)[1, 1, 19] = np.inf  # a value: one dim
        _slot(cache, 1, last - 6)[1, 1, 3] = np.nan  # the first one that a window of 6 hides from the last query
        _slot(cache, 1, 2)[1, 1, 0] = np.nan  # outside the window
        _slot(cache, 1, 3)[0, 1, 0] = np.inf
        yield case
    for alibi in (0.0, 8.0):
        case, _ = attention_case(op, f"nan-inf-query-alibi-{alibi:g}", chunks, alibi=alibi)
        case.arrays["q"][1, 3], case.arrays["q"][-1, 79], case.arrays["q"][-1, 0] = np.nan, np.nan, np.inf
        yield case


def _slot(cache: Paged, sequence: int, position: int) -> np.ndarray:
    """The K and V of a cached token in layer 0: a view [2, HK, Dh]."""
    page_size = cache.kv.shape[4]
    return cache.kv[cache.page_table[sequence, position // page_size], 0, :, :, position % page_size]
