"""embedding: look up rows of the token embedding matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..types import FLOAT_DTYPES, WEIGHT_DTYPES
from ._case_tools import normal, rng
from .contract import Array, Case, Contract


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The rows, by numpy indexing."""
    return {"out": arrays["weight"][arrays["ids"]]}


def cases() -> Iterator[Case]:
    """Row lengths around vector widths, repeated, first and last ids, values beyond f16, NaN and infinities."""
    for T, V, D in ((1, 1, 1), (1, 9, 33), (7, 50, 100), (65, 40, 64), (3, 17, 32), (2, 5, 4128), (4, 11, 512)):
        g = rng("embedding", T, V, D)
        ids = g.integers(0, V, T).astype(np.int32)
        ids[0], ids[-1] = 0, V - 1
        yield Case(f"{T}x{V}x{D}", {"ids": ids, "weight": normal(g, V, D)})
    g = rng("embedding", "values")
    ids = np.array([3, 3, 0, 5, 3], np.int32)
    weight = normal(g, 6, 96)
    yield Case("zero", {"ids": ids, "weight": np.zeros_like(weight)})
    yield Case("large", {"ids": ids, "weight": weight * 1e4})
    yield Case("tiny", {"ids": ids, "weight": weight * 1e-6})
    special = weight.copy()
    special[3, 7], special[5, 95], special[0, 0], special[1] = np.nan, np.inf, -np.inf, np.nan
    yield Case("nan-inf", {"ids": ids, "weight": special}, storage={"weight": FLOAT_DTYPES})
    yield Case("beyond-f16", {"ids": ids, "weight": weight * 1e5}, storage={"weight": FLOAT_DTYPES})


CONTRACT = Contract(
    name="embedding",
    doc="out[t] = weight[ids[t]], dequantized to f32.",
    dims={"T": "tokens", "V": "vocabulary size", "D": "hidden size"},
    arrays=(
        Array("ids", ("T",), ("i32",), doc="token ids in [0, V)"),
        Array("weight", ("V", "D"), WEIGHT_DTYPES, packed=True),
        Array("out", ("T", "D"), role="out"),
    ),
    reference=reference,
    cases=cases,
)
