"""pack_weight: a stored weight to the form that a device's kernels read, and whether it is made of numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..types import FLOAT_DTYPES, WEIGHT_DTYPES
from ._case_tools import normal, rng
from .contract import Array, Case, Contract


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The values themselves, and the first in each row that is none."""
    bad = ~np.isfinite(arrays["raw"])
    return {"out": arrays["raw"], "bad": np.where(bad.any(axis=1), bad.argmax(axis=1), -1)}


def cases() -> Iterator[Case]:
    """Rows of one element to several blocks of threads, around vector widths; zeros, extremes, NaN and infinities."""
    for N, K in ((1, 1), (3, 33), (7, 64), (2, 1000), (5, 1056), (1, 9000)):
        yield Case(f"{N}x{K}", {"raw": normal(rng("pack_weight", N, K), N, K)})
    raw = normal(rng("pack_weight", "values"), 6, 288)
    yield Case("zero", {"raw": raw * 0})
    yield Case("large", {"raw": raw * 1e4})
    yield Case("tiny", {"raw": raw * 1e-6})
    special = raw.copy()
    special[1, 287], special[3, 40], special[3, 100], special[5, 0] = np.nan, np.inf, np.nan, -np.inf
    yield Case("nan-inf", {"raw": special}, storage={"raw": FLOAT_DTYPES})


CONTRACT = Contract(
    name="pack_weight",
    doc=(
        "out = raw, in another type: a float type, or on devices the packed type of raw's block format "
        "(packed_types.packed_dtype), scales rounded to f16 where the format stores factors of them. "
        "bad[n] = the first element of row n that is NaN or infinite, or whose packed scale is; −1: there is none. "
        "out may be the same memory as raw if their types are equal."
    ),
    dims={"N": "rows", "K": "elements of a row"},
    arrays=(
        Array("raw", ("N", "K"), WEIGHT_DTYPES, doc="as the file stores it; a vector is one row"),
        Array("out", ("N", "K"), FLOAT_DTYPES, role="out", packed=True),
        Array("bad", ("N",), ("i32",), role="out"),
    ),
    reference=reference,
    cases=cases,
)
