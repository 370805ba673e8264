"""How exact CUDA kernels have to be, where a contract cannot say it of every backend."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np
from op_judge import Activation, Alternatives
from op_memory import Storage, rounded

from gllm_driver.launch._attention import TENSOR_CORE_DIMS
from gllm_driver.ops import CONTRACTS
from gllm_driver.ops.contract import Case, Contract
from gllm_driver.packed_types import PACKED_DTYPES, SEGMENT


def contract_for(op: str, case: Case, storage: Storage) -> Contract:
    """The op's contract, with the tolerance its CUDA kernels are held to.

    Prefill attention on tensor cores rounds queries and softmax weights to the type of the cache.
    """
    contract = CONTRACTS[op]
    if op == "flash_attention" and case.arrays["kv"].shape[-1] in TENSOR_CORE_DIMS:
        return dataclasses.replace(contract, tolerance={"f32": contract.tolerance[storage["kv"]]})
    return contract


INTEGERS = "activations of integers"  # the name of that alternative
EDGE = 6e-7  # relative: f32 may round a normalized activation to the 16-bit neighbour of what float64 rounds it to


def activations_for(op: str, storage: Storage) -> Alternatives:
    """What may become of the activations of a product: one 16-bit float each or the sum of two, for tensor cores, or
    integers of 16 bits, for byte products with packed weights."""
    reference = CONTRACTS[op].reference
    if reference is None or "activation" not in inspect.signature(reference).parameters:
        return {}
    found: Alternatives = {
        f"activations of {planes} × 16 bits": [sixteen_bit(storage, planes, nudge) for nudge in nudges()]
        for planes in (1, 2)
    }
    if any(dtype in PACKED_DTYPES for dtype in storage.values()):
        found[INTEGERS] = [integers(storage, nudge) for nudge in nudges()]
    return found


def nudges() -> list[Nudge]:
    """All activations a little less or more than they are, or some so and some so."""
    g = np.random.Generator(np.random.PCG64(0))
    found: list[Nudge] = [lambda shape: -EDGE, lambda shape: 0.0, lambda shape: EDGE]
    return found + [lambda shape: g.choice([-EDGE, EDGE], shape)] * 6


Nudge = Callable[[tuple[int, ...]], "np.ndarray | float"]


def integers(storage: Storage, nudge: Nudge) -> Activation:
    """Rounds rows for packed weights to integers of which the largest of each 256 elements is 32767."""

    def hook(weight: str, x: np.ndarray) -> np.ndarray:
        if storage[weight] not in PACKED_DTYPES:
            return x
        out = np.empty_like(x)
        for k in range(0, x.shape[-1], SEGMENT):
            part = x[..., k : k + SEGMENT]
            unit = np.abs(part).max(axis=-1, keepdims=True) / 32767
            with np.errstate(invalid="ignore"):  # what is no number makes no numbers
                out[..., k : k + SEGMENT] = np.rint(part / np.where(unit > 0, unit, 1) * (1 + nudge(part.shape))) * unit
        return out

    return hook


def sixteen_bit(storage: Storage, planes: int, nudge: Nudge) -> Activation:
    """Rounds rows to bf16 for bf16 weights, and otherwise to f16 scaled to put a row's maximum below 2^15."""

    def hook(weight: str, x: np.ndarray) -> np.ndarray:
        if storage[weight] == "f32":
            return x
        half = "bf16" if storage[weight] == "bf16" else "f16"
        top = np.where(np.isfinite(x), np.abs(x), 0.0).max(axis=-1, keepdims=True)
        exponent = 14 - np.floor(np.log2(np.where(top > 0, top, 1.0)))
        scale = np.exp2(np.where((top > 0) & (half == "f16"), exponent, 0.0))
        rest, kept = x * scale * (1 + nudge(x.shape)), np.zeros_like(x)
        for _ in range(planes):
            part = rounded(rest, half)
            kept = kept + part
            with np.errstate(invalid="ignore"):
                rest = np.where(np.isfinite(part), rest - part, 0.0)
        return kept / scale

    return hook
