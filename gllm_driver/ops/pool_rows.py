"""pool_rows: sums of runs of rows, carried on from step to step: mean pooling of hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ._case_tools import normal, rng
from .contract import Array, Case, Contract

# Columns of `pieces`.
ROW, FIRST, COUNT, BEGINS = range(4)


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """By numpy sums."""
    x, sums = arrays["x"], arrays["sums"].copy()
    with np.errstate(invalid="ignore"):
        for row, first, count, begins in arrays["pieces"]:
            if count:
                sums[row] = x[first : first + count].sum(axis=0) + (0 if begins else sums[row])
    return {"sums": sums}


def cases() -> Iterator[Case]:
    """One row to many, ragged pieces, rows in between that belong to none, sums that begin, go on and stay."""
    for T, D in ((1, 1), (7, 33), (40, 64), (65, 300), (3, 1031)):
        g = rng("pool_rows", T, D)
        x, sums = normal(g, T, D), normal(g, 4, D)
        whole = np.array([[2, 0, T, 1]], np.int32)
        yield Case(f"{T}x{D}", {"x": x, "pieces": whole, "sums": sums})
        yield Case(f"{T}x{D}-on", {"x": x, "pieces": whole * [1, 1, 1, 0], "sums": sums}, condition=4.0)
        cut = [T // 3, T - T // 4]
        pieces = np.array([[3, 0, cut[0], 0], [0, cut[0], cut[1] - cut[0], 1], [1, T - 1, 1, 0]], np.int32)
        yield Case(f"{T}x{D}-pieces", {"x": x, "pieces": pieces, "sums": sums}, condition=4.0)
    g = rng("pool_rows", "values")
    x, sums = normal(g, 6, 50), normal(g, 2, 50)
    pieces = np.array([[1, 1, 4, 1], [0, 5, 0, 1], [0, 0, 0, 0]], np.int32)  # the last two are padding: they do nothing
    yield Case("padding", {"x": x, "pieces": pieces, "sums": sums})
    yield Case("zero", {"x": x * 0, "pieces": pieces, "sums": sums})
    stale = np.full_like(sums, np.nan)  # what begins does not read what was there
    yield Case("stale", {"x": x, "pieces": np.array([[0, 0, 3, 1], [1, 3, 3, 1]], np.int32), "sums": stale})
    special = x.copy()
    special[2, 3], special[4, 40], special[3, 7], special[1, 7] = np.nan, np.inf, np.inf, -np.inf
    yield Case("nan-inf", {"x": special, "pieces": pieces, "sums": sums})


CONTRACT = Contract(
    name="pool_rows",
    doc=(
        "For each piece (row, first, count, begins): sums[row] = x[first] + … + x[first + count − 1], added to what "
        "sums[row] was unless it begins; a piece of no rows does nothing. No row of sums is in two pieces that have "
        "rows. The sum is taken in order of the rows, so that it does not depend on how they come in pieces."
    ),
    dims={"T": "rows of x", "P": "pieces", "S": "rows of sums", "D": "hidden size"},
    arrays=(
        Array("x", ("T", "D")),
        Array("pieces", ("P", 4), ("i32",), doc="row, first, count, begins"),
        Array("sums", ("S", "D"), role="inout"),
    ),
    reference=reference,
    cases=cases,
)
