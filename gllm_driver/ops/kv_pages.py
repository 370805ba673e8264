"""kv_pages: whole pages of the KV cache to a contiguous buffer, or back: swapping, saving, restoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ._case_tools import rng
from .contract import Array, Case, Contract, Scalar

GATHER, SCATTER = 0, 1


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """By numpy indexing."""
    kv, buffer, pages = arrays["kv"].copy(), arrays["buffer"].copy(), arrays["pages"]
    if scalars["direction"] == GATHER:
        buffer[:] = kv[pages]
    else:
        kv[pages] = buffer
    return {"kv": kv, "buffer": buffer}


def cases() -> Iterator[Case]:
    """One page to many, sizes around vector widths and chunks, first, last and (gathering) repeated pages."""
    for num_pages, count, nbytes in ((1, 1, 1), (5, 3, 16), (9, 9, 48), (7, 4, 1040), (4, 2, 16_400), (6, 3, 33_001)):
        g = rng("kv_pages", num_pages, count, nbytes)
        pages = g.permutation(num_pages)[:count].astype(np.int32)
        pages[-1] = num_pages - 1 if num_pages - 1 not in pages else pages[-1]
        arrays = {
            "kv": g.integers(0, 256, (num_pages, nbytes), np.uint8),
            "buffer": g.integers(0, 256, (count, nbytes), np.uint8),
            "pages": pages,
        }
        for name, direction in (("gather", GATHER), ("scatter", SCATTER)):
            yield Case(f"{name}-{num_pages}-{count}-{nbytes}", arrays, {"direction": direction})
        repeated = np.array([num_pages - 1, 0, num_pages - 1], np.int32)
        buffer = g.integers(0, 256, (3, nbytes), np.uint8)
        label = f"gather-repeated-{num_pages}-{nbytes}"
        yield Case(label, {**arrays, "pages": repeated, "buffer": buffer}, {"direction": GATHER})


CONTRACT = Contract(
    name="kv_pages",
    doc=(
        "direction 0 (gather): buffer[n] = kv[pages[n]]; direction 1 (scatter): kv[pages[n]] = buffer[n], for which no "
        "page may come twice. Pages are bytes: every layer's K and V of the page, whatever their dtype."
    ),
    dims={"NP": "pages in the cache", "N": "pages to copy", "B": "bytes per page"},
    arrays=(
        Array("kv", ("NP", "B"), ("u8",), role="inout"),
        Array("buffer", ("N", "B"), ("u8",), role="inout"),
        Array("pages", ("N",), ("i32",), doc="page ids in [0, NP)"),
    ),
    scalars=(Scalar("direction", "i32", GATHER, SCATTER, doc="0 cache to buffer, 1 buffer to cache"),),
    reference=reference,
    cases=cases,
)
