"""fused_gate_up_silu: norm, gate and up projections, activation, product (SwiGLU / GeGLU, Shazeer 2020).

Without a gate it is the first half of a plain feed-forward network: norm, projection, activation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..types import FLOAT_DTYPES, WEIGHT_DTYPES
from ._case_tools import normal, rng
from .contract import Array, Case, Contract, Rule, Scalar
from .linear import Activation, project, unchanged
from .rms_norm import CENTER, normalize

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def silu(x: np.ndarray) -> np.ndarray:
    """x · sigmoid(x)."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in the tanh form (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: np.ndarray) -> np.ndarray:
    """x · Φ(x), Φ being the normal distribution function (Hendrycks & Gimpel 2016)."""
    with np.errstate(invalid="ignore"):
        return 0.5 * x * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2))


def reference(
    arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float], activation: Activation = unchanged
) -> dict[str, np.ndarray]:
    """The definition, op by op."""
    h = normalize(arrays["x"], arrays["norm"], scalars["eps"], scalars.get("center", 0), arrays.get("norm_bias", 0.0))
    act = (silu, gelu_tanh, gelu)[int(scalars["activation"])]
    up = project(activation("up", h), arrays["up"], arrays.get("up_bias", 0.0))
    if "gate" not in arrays:
        return {"out": act(up)}
    return {"out": act(project(activation("gate", h), arrays["gate"], arrays.get("gate_bias", 0.0))) * up}


def cases() -> Iterator[Case]:
    """Sizes around tiles, both activations, biases, weights of mixed dtypes, values from zero to NaN."""
    sizes = [(1, 1, 1), (1, 33, 5), (3, 100, 7), (2, 61, 130), (1, 64, 67), (4, 96, 9), (33, 64, 35), (130, 96, 40)]
    sizes += [(2, 256, 11), (18, 512, 24)]  # blocks of 256
    for T, D, F in sizes:
        for code, name in enumerate(ACTIVATIONS):
            g = rng("gate_up", T, D, F)
            arrays = {"x": normal(g, T, D), "norm": normal(g, D)}
            arrays |= {"gate": normal(g, F, D, scale=D**-0.5), "up": normal(g, F, D, scale=D**-0.5)}
            yield Case(f"{T}x{D}x{F}-{name}", arrays, {"eps": 1e-5, "activation": code})
            if T <= 4:
                biases = {"gate_bias": normal(g, F), "up_bias": normal(g, F)}
                yield Case(f"{T}x{D}x{F}-{name}-bias", {**arrays, **biases}, {"eps": 1e-6, "activation": code})
            plain = {k: v for k, v in arrays.items() if k != "gate"}
            scalars = {"eps": 1e-5, "activation": code, "center": code % 2}
            yield Case(f"{T}x{D}x{F}-{name}-no-gate", plain, scalars)
            biases = {"norm_bias": normal(g, D), "up_bias": normal(g, F)}
            yield Case(f"{T}x{D}x{F}-{name}-no-gate-bias", {**plain, **biases}, {**scalars, "center": 1})
    for T in (1, 6, 40):
        yield from _value_cases(T)


def _value_cases(T: int) -> Iterator[Case]:
    g = rng("gate_up", "values", T)
    x, gate, up = normal(g, T, 96), normal(g, 19, 96, scale=0.1), normal(g, 19, 96, scale=0.1)
    plain = {"x": x, "norm": normal(g, 96), "gate": gate, "up": up}
    special = x.copy()
    special[T - 1, 95], special[T // 2, 0] = np.nan, np.inf
    nan_gate, nan_up = gate.copy(), up.copy()
    nan_gate[3, 95] = nan_up[18, 0] = np.nan
    floats = {"gate": FLOAT_DTYPES, "up": FLOAT_DTYPES}
    for code, name in enumerate(ACTIVATIONS):
        scalars = {"eps": 1e-6, "activation": code}
        yield Case(f"zero-{name}-{T}", {**plain, "x": x * 0}, scalars)
        yield Case(f"large-x-{name}-{T}", {**plain, "x": x * 1e6}, scalars)
        yield Case(f"tiny-x-{name}-{T}", {**plain, "x": x * 1e-12}, scalars)
        yield Case(f"large-gate-{name}-{T}", {**plain, "gate": gate * 1e5}, scalars)
        yield Case(f"large-up-{name}-{T}", {**plain, "up": up * 1e5}, scalars)
        yield Case(f"nan-inf-x-{name}-{T}", {**plain, "x": special}, scalars)
        layer_norm = {**plain, "x": special, "norm_bias": normal(g, 96)}
        yield Case(f"nan-inf-center-{name}-{T}", layer_norm, {**scalars, "center": 1})
        del layer_norm["gate"]
        wide = {**layer_norm, "x": x, "up": up * 1e5}
        yield Case(f"large-no-gate-{name}-{T}", wide, {**scalars, "center": 1})
        yield Case(f"zero-no-gate-{name}-{T}", {**wide, "up": up * 0, "up_bias": normal(g, 19)}, scalars)
        yield Case(f"nan-weights-{name}-{T}", {**plain, "gate": nan_gate, "up": nan_up}, scalars, storage=floats)
    for mixed in (("q8_0", "q4_0"), ("q4_0", "f16"), ("bf16", "f32")):
        storage = {"gate": mixed[:1], "up": mixed[1:]}
        yield Case(f"mixed-{'-'.join(mixed)}-{T}", plain, {"eps": 1e-6, "activation": 0}, storage=storage)


CONTRACT = Contract(
    name="fused_gate_up_silu",
    doc=(
        "h = rms_norm(x, norm, norm_bias); out = act(h·gateᵀ + gate_bias) · (h·upᵀ + up_bias), or act(h·upᵀ + up_bias) "
        "without a gate, act being SiLU, GELU in its tanh form, or GELU."
    ),
    dims={"T": "tokens", "D": "hidden size", "F": "intermediate size"},
    arrays=(
        Array("x", ("T", "D")),
        Array("norm", ("D",)),
        Array("norm_bias", ("D",), optional=True),
        Array("gate", ("F", "D"), WEIGHT_DTYPES, optional=True, packed=True),
        Array("up", ("F", "D"), WEIGHT_DTYPES, packed=True),
        Array("gate_bias", ("F",), optional=True),
        Array("up_bias", ("F",), optional=True),
        Array("out", ("T", "F"), role="out"),
    ),
    scalars=(
        Scalar("eps", "f32", 0.0, 1.0),
        Scalar("activation", "i32", 0, len(ACTIVATIONS) - 1, doc="index into ACTIVATIONS"),
        CENTER,
    ),
    constants={name: code for code, name in enumerate(ACTIVATIONS)},
    rules=(
        Rule(
            lambda v: not v["has_gate"] or v["has_gate_bias"] == v["has_up_bias"], "gate_bias and up_bias come together"
        ),
        Rule(lambda v: v["has_gate"] or not v["has_gate_bias"], "a gate_bias needs a gate"),
    ),
    reference=reference,
    cases=cases,
)
