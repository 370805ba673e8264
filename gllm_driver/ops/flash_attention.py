"""flash_attention: causal attention of packed query chunks over the paged KV cache (prefill, chunked prefill, mixes).

FlashAttention-2 (Dao 2023): tiled, online softmax, nothing of size T × T is ever stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..types import FLOAT_DTYPES
from ._attention import attend, attention_case, shared_cases
from ._case_tools import Chunk
from .contract import Array, Case, Contract, Rule, Scalar

DIMS = {
    "T": "query tokens",
    "QD": "query heads × head_dim",
    "NP": "pages in the cache",
    "L": "layers in the cache",
    "HK": "KV heads",
    "P": "tokens per page",
    "Dh": "head_dim",
    "S": "sequences",
    "MP": "page table width",
}
KV = Array("kv", ("NP", "L", 2, "HK", "P", "Dh"), FLOAT_DTYPES)
SCALARS = (
    Scalar("layer", "i32", 0),
    Scalar("window", "i32", 0, default=0, doc="sliding window in tokens, the query itself included; 0 is unlimited"),
    Scalar("scale", "f32", 0.0, doc="factor on q·k, normally head_dim^-0.5"),
    Scalar("alibi_max_bias", "f32", 0.0, 1000.0, default=0.0, doc="of the slopes (ops/_attention.py); 0 is no bias"),
)
RULES = (
    Rule(lambda v: v["layer"] < v["L"], "layer is a layer of the cache"),
    Rule(lambda v: v["QD"] % (v["HK"] * v["Dh"]) == 0, "query heads are a multiple of KV heads"),
)


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The definition, query by query."""
    offsets = arrays["offsets"]
    return {"out": attend(arrays, scalars, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))}


def cases() -> Iterator[Case]:
    """Packed sequences of length 0, 1 and many, chunks after cached context, windows, shapes, values."""
    yield attention_case("flash_attention", "one", [Chunk(1)], heads=1, kv_heads=1, head_dim=8, page_size=1)[0]
    for label, chunks in (
        ("whole", [Chunk(37)]),
        ("chunk", [Chunk(11, 13)]),
        ("one-after-context", [Chunk(1, 40)]),
        ("ragged", [Chunk(1), Chunk(7), Chunk(33), Chunk(0), Chunk(5), Chunk(16)]),
        ("mixed", [Chunk(1, 29), Chunk(5, 13), Chunk(40), Chunk(17, 3), Chunk(1)]),
    ):
        for window in (0, 8):
            yield attention_case("flash_attention", f"{label}-{window}", chunks, window=window, page_size=16)[0]
    yield from shared_cases("flash_attention", [Chunk(3), Chunk(14, 19), Chunk(1, 2)])
    for window, alibi in ((0, 0.0), (100, 0.0), (257, 0.0), (0, 8.0)):
        label = f"long-{window}-{alibi:g}"
        options = {"page_size": 16, "window": window, "alibi": alibi}
        yield attention_case("flash_attention", label, [Chunk(70, 600), Chunk(150)], **options)[0]  # type: ignore[arg-type]


CONTRACT = Contract(
    name="flash_attention",
    doc=(
        "Query t of sequence s at position p sees the cached tokens max(0, p − window + 1) … p of s. Query head h "
        "reads KV head h / (heads per KV head). out = softmax(scale · q·Kᵀ + bias) · V, where bias is the head's "
        "ALiBi slope times (key position − query position)."
    ),
    dims={**DIMS, "S1": "sequences + 1"},
    arrays=(
        Array("q", ("T", "QD")),
        KV,
        Array("page_table", ("S", "MP"), ("i32",)),
        Array("positions", ("T",), ("i64",)),
        Array("offsets", ("S1",), ("i32",), doc="queries of sequence s are rows offsets[s] … offsets[s+1] − 1"),
        Array("out", ("T", "QD"), role="out"),
    ),
    scalars=SCALARS,
    rules=(*RULES, Rule(lambda v: v["S1"] == v["S"] + 1, "offsets has one entry more than there are sequences")),
    reference=reference,
    cases=cases,
)
