"""linear: matrix product with a stored weight, plus bias and residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ..types import FLOAT_DTYPES, WEIGHT_DTYPES
from ._case_tools import normal, rng
from .contract import Array, Case, Contract

Activation = Callable[[str, np.ndarray], np.ndarray]


def unchanged(weight: str, x: np.ndarray) -> np.ndarray:
    """The rows that enter the product with `weight`, as they are; tests put a kernel's int8 activations here."""
    return x


def project(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """x · weightᵀ + bias."""
    with np.errstate(invalid="ignore"):
        return x @ weight.T + bias


def reference(
    arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float], activation: Activation = unchanged
) -> dict[str, np.ndarray]:
    """The definition."""
    x = activation("weight", arrays["x"])
    out = project(x, arrays["weight"], arrays.get("bias", 0.0))
    return {"out": out + arrays.get("residual", 0.0)}


def cases() -> Iterator[Case]:
    """One row to many, sizes around tiles and vector widths, bias and residual, aliasing, values from zero to NaN."""
    sizes = [(1, 1, 1), (1, 33, 5), (3, 100, 7), (2, 61, 130), (1, 32, 1), (1, 64, 67), (4, 96, 9), (5, 160, 33)]
    sizes += [(8, 64, 40), (17, 96, 21), (33, 64, 35), (130, 224, 70), (1, 4128, 3), (2, 1056, 513)]
    sizes += [(1, 768, 70), (3, 256, 37), (18, 512, 21)]  # blocks of 256
    for T, K, N in sizes:
        g = rng("linear", T, K, N)
        arrays = {"x": normal(g, T, K), "weight": normal(g, N, K)}
        yield Case(f"{T}x{K}x{N}", arrays)
        if T <= 5:
            full = {**arrays, "bias": normal(g, N), "residual": normal(g, T, N)}
            yield Case(f"{T}x{K}x{N}-bias-residual", full)
    g = rng("linear", "values")
    for T in (1, 6, 40):
        x, weight, bias, residual = normal(g, T, 96), normal(g, 19, 96), normal(g, 19), normal(g, T, 19)
        arrays = {"x": x, "weight": weight}
        yield Case(f"bias-{T}", {**arrays, "bias": bias})
        yield Case(f"residual-{T}", {**arrays, "residual": residual})
        yield Case(f"in-place-{T}", {**arrays, "bias": bias, "residual": residual}, aliases={"out": "residual"})
        yield Case(f"zero-x-{T}", {"x": x * 0, "weight": weight})
        yield Case(f"zero-weight-{T}", {"x": x, "weight": weight * 0, "bias": bias})
        yield Case(f"large-{T}", {"x": x * 1e6, "weight": weight * 1e4})
        yield Case(f"tiny-{T}", {"x": x * 1e-9, "weight": weight * 1e-3})
        outlier = x.copy()
        outlier[:, 40] = 500
        yield Case(f"outlier-{T}", {"x": outlier, "weight": weight})
        uneven = x * np.repeat(np.array([1e-3, 1, 1e3], np.float32), 32)
        yield Case(f"uneven-blocks-{T}", {"x": uneven, "weight": weight})
        special = x.copy()
        special[T - 1, 95], special[T // 2, 0] = np.nan, np.inf
        yield Case(f"nan-inf-x-{T}", {"x": special, "weight": weight})
        special = residual.copy()
        special[T // 2, [0, 18]] = np.nan, -np.inf
        yield Case(f"nan-inf-residual-{T}", {**arrays, "residual": special})
        special = weight.copy()
        special[3, 95], special[18, 0] = np.nan, np.inf
        yield Case(f"nan-inf-weight-{T}", {"x": x, "weight": special}, storage={"weight": FLOAT_DTYPES})


CONTRACT = Contract(
    name="linear",
    doc="out = x · weightᵀ + bias + residual. out may be the same memory as residual.",
    dims={"T": "tokens", "K": "input features", "N": "output features"},
    arrays=(
        Array("x", ("T", "K")),
        Array("weight", ("N", "K"), WEIGHT_DTYPES, packed=True),
        Array("bias", ("N",), optional=True),
        Array("residual", ("T", "N"), optional=True),
        Array("out", ("T", "N"), role="out"),
    ),
    reference=reference,
    cases=cases,
)
