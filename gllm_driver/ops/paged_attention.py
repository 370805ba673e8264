"""paged_attention: decode attention, one query token per sequence, with the cached context split among workers.

Split-KV as in Flash-Decoding (Dao et al. 2023): partial results over fixed spans of the context, merged in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ._attention import attend, attention_case, shared_cases
from ._case_tools import Chunk
from .contract import Array, Case, Contract
from .flash_attention import DIMS, KV, RULES, SCALARS


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The definition, sequence by sequence."""
    return {"out": attend(arrays, scalars, np.arange(len(arrays["q"])))}


def cases() -> Iterator[Case]:
    """One sequence to many, contexts from none to thousands of tokens, windows, shapes, values."""
    yield attention_case("paged_attention", "one", [Chunk(1)], heads=1, kv_heads=1, head_dim=8, page_size=1)[0]
    for contexts in ((0, 1), (15, 16, 17), (63, 64, 65, 3), (127, 128), (255, 256, 0), (511,)):
        chunks = [Chunk(1, c) for c in contexts]
        for window in (0, 16):
            label = f"contexts-{'-'.join(map(str, contexts))}-{window}"
            yield attention_case("paged_attention", label, chunks, window=window, page_size=16)[0]
    yield from shared_cases("paged_attention", [Chunk(1, 3), Chunk(1, 33), Chunk(1), Chunk(1, 20)])
    chunks = [Chunk(1, 3000), Chunk(1, 7), Chunk(1, 2047)]
    for window, page_size, alibi in ((0, 16, 0.0), (1500, 16, 0.0), (64, 16, 0.0), (0, 1, 0.0), (0, 16, 20.0)):
        options = {"window": window, "page_size": page_size, "alibi": alibi}
        label = f"long-{window}-{page_size}-{alibi:g}"
        yield attention_case("paged_attention", label, chunks, **options)[0]  # type: ignore[arg-type]


CONTRACT = Contract(
    name="paged_attention",
    doc="As flash_attention with exactly one query per sequence: query s belongs to sequence s.",
    dims={k: v for k, v in DIMS.items() if k != "T"},
    arrays=(
        Array("q", ("S", "QD")),
        KV,
        Array("page_table", ("S", "MP"), ("i32",)),
        Array("positions", ("S",), ("i64",)),
        Array("out", ("S", "QD"), role="out"),
    ),
    scalars=SCALARS,
    rules=RULES,
    reference=reference,
    cases=cases,
)
