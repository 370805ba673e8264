"""fused_qkv_rope: norm, Q/K/V projections, biases, q/k-norm, rotary embedding and the write into the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..types import FLOAT_DTYPES, WEIGHT_DTYPES
from ._qkv_cases import cases
from .contract import Array, Contract, Rule, Scalar
from .linear import Activation, project, unchanged
from .rms_norm import CENTER, normalize

INTERLEAVED = 1  # pairs (0, 1), (2, 3), …; otherwise NeoX: pairs (i, i + rotary_dim / 2)


def rotate(heads: np.ndarray, cos_sin: np.ndarray, style: int) -> np.ndarray:
    """Rotary embedding: heads [T, H, Dh], cos_sin [T, 2, R] → [T, H, Dh], dims past 2R as they are."""
    pairs = np.arange(cos_sin.shape[2])
    first, second = (2 * pairs, 2 * pairs + 1) if style == INTERLEAVED else (pairs, pairs + len(pairs))
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    a, b = heads[..., first], heads[..., second]
    out = heads.copy()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def reference(
    arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float], activation: Activation = unchanged
) -> dict[str, np.ndarray]:
    """q [T, QD] and the cache after the step, op by op."""
    kv, positions, style = arrays["kv"].copy(), arrays["positions"], int(scalars["rope_style"])
    page_size, head_dim = kv.shape[4:]
    h = normalize(arrays["x"], arrays["norm"], scalars["eps"], scalars.get("center", 0), arrays.get("norm_bias", 0.0))

    def heads_of(name: str) -> np.ndarray:
        rows = project(activation(f"w{name}", h), arrays[f"w{name}"], arrays.get(f"b{name}", 0.0))
        return rows.reshape(len(h), -1, head_dim)

    def place(name: str) -> np.ndarray:
        heads = heads_of(name)
        if f"{name}_norm" in arrays:
            heads = normalize(heads, arrays[f"{name}_norm"], scalars.get("qk_eps", 0.0))
        return rotate(heads, arrays["cos_sin"], style)

    q, k, v = place("q"), place("k"), heads_of("v")
    for t, position in enumerate(positions):
        page = arrays["page_table"][arrays["seq"][t], position // page_size]
        kv[page, int(scalars["layer"]), :, :, position % page_size] = k[t], v[t]
    return {"q": q.reshape(len(h), -1), "kv": kv}


CONTRACT = Contract(
    name="fused_qkv_rope",
    doc=(
        "h = rms_norm(x, norm, norm_bias); q, k, v = h·wqᵀ + bq, h·wkᵀ + bk, h·wvᵀ + bv; optional RMSNorm over "
        "each q and k head; the first 2R dims of each q and k head rotated by cos_sin; q goes to `q`, k and v of token "
        "t go to slot positions[t] of its sequence: page page_table[seq[t], pos / P], row pos % P."
    ),
    dims={
        "T": "tokens",
        "D": "hidden size",
        "QD": "query heads × head_dim",
        "KD": "KV heads × head_dim",
        "Dh": "head_dim",
        "R": "rotated pairs per head",
        "NP": "pages in the cache",
        "L": "layers in the cache",
        "HK": "KV heads",
        "P": "tokens per page",
        "S": "sequences",
        "MP": "page table width",
    },
    arrays=(
        Array("x", ("T", "D")),
        Array("norm", ("D",)),
        Array("norm_bias", ("D",), optional=True),
        Array("wq", ("QD", "D"), WEIGHT_DTYPES, packed=True),
        Array("wk", ("KD", "D"), WEIGHT_DTYPES, packed=True),
        Array("wv", ("KD", "D"), WEIGHT_DTYPES, packed=True),
        Array("bq", ("QD",), optional=True),
        Array("bk", ("KD",), optional=True),
        Array("bv", ("KD",), optional=True),
        Array("q_norm", ("Dh",), optional=True),
        Array("k_norm", ("Dh",), optional=True),
        Array("cos_sin", ("T", 2, "R")),
        Array("positions", ("T",), ("i64",)),
        Array("seq", ("T",), ("i32",), doc="sequence of each token, a row of page_table"),
        Array("page_table", ("S", "MP"), ("i32",)),
        Array("kv", ("NP", "L", 2, "HK", "P", "Dh"), FLOAT_DTYPES, role="inout"),
        Array("q", ("T", "QD"), role="out"),
    ),
    scalars=(
        Scalar("layer", "i32", 0),
        Scalar("rope_style", "i32", 0, INTERLEAVED, doc="0 NeoX, 1 interleaved"),
        Scalar("eps", "f32", 0.0, 1.0),
        Scalar("qk_eps", "f32", 0.0, 1.0, default=0.0),
        CENTER,
    ),
    constants={"INTERLEAVED": INTERLEAVED},
    rules=(
        Rule(lambda v: v["layer"] < v["L"], "layer is a layer of the cache"),
        Rule(lambda v: v["KD"] == v["HK"] * v["Dh"], "KD = HK · Dh"),
        Rule(lambda v: v["QD"] % v["KD"] == 0, "query heads are a multiple of KV heads"),
        Rule(lambda v: 2 * v["R"] <= v["Dh"], "the rotated dims fit in a head"),
        Rule(lambda v: v["has_q_norm"] == v["has_k_norm"], "q_norm and k_norm come together"),
    ),
    reference=reference,
    cases=cases,
)
