"""rms_norm: root mean square layer normalization (Zhang & Sennrich 2019), with residual add and row selection.

With `center` the mean is subtracted first and the op is LayerNorm (Ba et al. 2016), whose bias may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ._case_tools import normal, rng
from .contract import Array, Case, Contract, Rule, Scalar

CENTER = Scalar("center", "i32", 0, 1, default=0, doc="0 RMSNorm, 1 LayerNorm: the mean is subtracted first")


def normalize(
    x: np.ndarray, weight: np.ndarray, eps: float, center: float = 0, bias: np.ndarray | float = 0.0
) -> np.ndarray:
    """The definition, over the last axis."""
    with np.errstate(invalid="ignore"):
        if center:
            x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """out [S, D] and x [T, D] as it is afterwards."""
    x = arrays["x"] + arrays.get("residual", 0.0)
    rows = x[arrays.get("rows", slice(None))]
    out = normalize(rows, arrays["weight"], scalars["eps"], scalars.get("center", 0), arrays.get("bias", 0.0))
    return {"x": x, "out": out}


def cases() -> Iterator[Case]:
    """Row lengths around vector widths, each with and without residual and rows; values from zero to NaN."""
    for T, D in ((1, 1), (1, 33), (7, 100), (4, 64), (3, 31), (2, 4099)):
        g = rng("rms_norm", T, D)
        arrays = {"x": normal(g, T, D), "weight": normal(g, D)}
        eps = {"eps": 1e-5}
        yield Case(f"{T}x{D}", arrays, eps)
        yield Case(f"{T}x{D}-residual", {**arrays, "residual": normal(g, T, D)}, eps)
        rows = np.array([T - 1, 0, T - 1, *range(T)], np.int32)
        yield Case(f"{T}x{D}-rows", {**arrays, "rows": rows}, {"eps": 1e-6})
        yield Case(f"{T}x{D}-last-row", {**arrays, "rows": rows[:1]}, {"eps": 1e-6})
        layer_norm = {"eps": 1e-5, "center": 1}
        yield Case(f"{T}x{D}-center", arrays, layer_norm)
        biased = {**arrays, "bias": normal(g, D)}
        yield Case(f"{T}x{D}-center-bias-residual", {**biased, "residual": normal(g, T, D)}, layer_norm)
        yield Case(f"{T}x{D}-center-bias-rows", {**biased, "rows": rows}, layer_norm)
    g = rng("rms_norm", "values")
    x, weight = normal(g, 9, 77), normal(g, 77)
    bias = normal(g, 77)
    yield Case("bias", {"x": x, "weight": weight, "bias": bias}, {"eps": 1e-6})
    yield Case(
        "center-off-zero", {"x": x + 30, "weight": weight, "bias": bias}, {"eps": 1e-6, "center": 1}, condition=30.0
    )
    yield Case("center-equal", {"x": x * 0 + 3, "weight": weight, "bias": bias}, {"eps": 1e-6, "center": 1})
    yield Case("zero", {"x": x * 0, "weight": weight}, {"eps": 1e-6})
    yield Case("cancelled", {"x": x, "residual": -x, "weight": weight}, {"eps": 1e-6})
    yield Case("no-eps", {"x": x, "weight": weight}, {"eps": 0.0})
    yield Case("large-eps", {"x": x, "weight": weight}, {"eps": 1.0})
    for label, factor in (("large", 1e6), ("very-large", 1e16), ("tiny", 1e-12)):
        yield Case(label, {"x": x * np.float32(factor), "weight": weight}, {"eps": 1e-6})
    outlier = x.copy()
    outlier[:, 5] = 3e4
    yield Case("outlier", {"x": outlier, "residual": normal(g, 9, 77), "weight": weight}, {"eps": 1e-6})
    special = x.copy()
    special[1, 76], special[3, 0], special[5, 40], special[6, 1], special[6, 2] = (
        np.nan,
        np.inf,
        -np.inf,
        np.inf,
        np.nan,
    )
    yield Case("nan-inf", {"x": special, "weight": weight}, {"eps": 1e-6})
    yield Case("nan-inf-center", {"x": special, "weight": weight, "bias": bias}, {"eps": 1e-6, "center": 1})
    yield Case("nan-inf-residual", {"x": x, "residual": special, "weight": weight}, {"eps": 1e-6})
    yield Case(
        "nan-inf-rows", {"x": special, "weight": weight, "rows": np.array([0, 1, 2, 4, 7], np.int32)}, {"eps": 1e-6}
    )
    weight = weight.copy()
    weight[[0, 76]] = np.nan, np.inf
    yield Case("nan-inf-weight", {"x": x, "weight": weight}, {"eps": 1e-6})


CONTRACT = Contract(
    name="rms_norm",
    doc=(
        "out[s] = x[r] / sqrt(mean(x[r]²) + eps) · weight + bias, r = rows[s]; with a residual, x[r] += residual[r] "
        "first; with `center`, x[r] − mean(x[r]) stands for x[r]."
    ),
    dims={"T": "rows of x", "S": "rows of out", "D": "hidden size"},
    arrays=(
        Array("x", ("T", "D"), role="inout", doc="written only when a residual is given"),
        Array("weight", ("D",)),
        Array("bias", ("D",), optional=True),
        Array("residual", ("T", "D"), optional=True),
        Array(
            "rows", ("S",), ("i32",), optional=True, doc="rows of x to take; all, in order, when absent (then S = T)"
        ),
        Array("out", ("S", "D"), role="out"),
    ),
    scalars=(Scalar("eps", "f32", 0.0, 1.0), CENTER),
    rules=(
        Rule(lambda v: v["has_rows"] or v["S"] == v["T"], "without rows, out has as many rows as x"),
        Rule(lambda v: not (v["has_rows"] and v["has_residual"]), "rows and residual exclude each other"),
    ),
    reference=reference,
    cases=cases,
)
