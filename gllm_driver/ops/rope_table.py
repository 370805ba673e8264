"""rope_table: cosines and sines of the rotary position embedding (Su et al. 2021), once per step for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .contract import Array, Case, Contract, Scalar


def reference(arrays: Mapping[str, np.ndarray], scalars: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The definition; numpy reduces large angles exactly."""
    angle = arrays["positions"][:, None] * arrays["inv_freq"]
    return {"cos_sin": np.stack([np.cos(angle), np.sin(angle)], axis=1) * scalars["scale"]}


def cases() -> Iterator[Case]:
    """Positions from 0 to beyond 2**31, one pair to many, attention factors, a frequency of 0."""
    near = np.array([0, 1, 2, 3, 100, 4095], np.int64)
    far = np.array([2**21 - 1, 2**21, 2**21 + 1, 2_100_000, 2**24 + 1, 2**31 - 1, 2**31, 2**33 + 7], np.int64)
    for label, positions in (("one", near[:1]), ("near", near), ("far", far), ("one-far", far[1:2])):
        for pairs, theta in ((1, 1e4), (16, 1e4), (33, 5e5), (64, 1e6)):
            inv_freq = theta ** -(np.arange(pairs) / pairs)
            arrays = {"positions": positions, "inv_freq": inv_freq}
            yield Case(f"{label}-{pairs}", arrays, {"scale": 1.0})
    inv_freq = 1e4 ** -(np.arange(24) / 24)
    inv_freq[20:] = 0
    yield Case("scaled", {"positions": far, "inv_freq": inv_freq / 8}, {"scale": 1.2079442})
    yield Case("scale-0", {"positions": near, "inv_freq": inv_freq}, {"scale": 0.0})


CONTRACT = Contract(
    name="rope_table",
    doc=(
        "cos_sin[t, 0, i] = cos(positions[t] · inv_freq[i]) · scale, cos_sin[t, 1, i] = sin(…) · scale. The angle is "
        "taken in f64: in f32 it is off by 0.1 rad at two million tokens."
    ),
    dims={"T": "tokens", "R": "rotated pairs (rotary_dim / 2)"},
    arrays=(
        Array("positions", ("T",), ("i64",)),
        Array("inv_freq", ("R",), ("f64",)),
        Array("cos_sin", ("T", 2, "R"), role="out", error_axes=2),
    ),
    scalars=(Scalar("scale", "f32", 0.0, doc="attention factor of the scaling method, 1 for plain RoPE"),),
    reference=reference,
    cases=cases,
)
