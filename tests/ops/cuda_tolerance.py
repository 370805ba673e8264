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


def contract_for(op: str, case: Case, storage: Storage) -> Contract:
    """The op's contract, with the tolerance its CUDA kernels are held to.

    Prefill attention on tensor cores rounds queries and softmax weights to the type of the cache.
    """
    contract = CONTRACTS[op]
    if op == "flash_attention" and case.arrays["kv"].shape[-1] in TENSOR_CORE_DIMS:
        return dataclasses.replace(contract, tolerance={"f32": contract.tolerance[storage["kv"]]})
    return contract


EDGE = 6e-7  # relative: f32 may round a normalized activation to the 16-bit neighbour of what float64 rounds it to


def activations_for(op: str, storage: Storage) -> Alternatives:
    """What tensor cores may do to the activations of a product: one 16-bit float each, or, for bf16, the sum of two."""
    reference = CONTRACTS[op].reference
    if reference is None or "activation" not in inspect.signature(reference).parameters:
        return {}
    g = np.random.Generator(np.random.PCG64(0))
    nudges: list[Nudge] = [lambda shape: -EDGE, lambda shape: 0.0, lambda shape: EDGE]
    nudges += [lambda shape: g.choice([-EDGE, EDGE], shape)] * 6
    return {
        f"activations of {planes} × 16 bits": [sixteen_bit(storage, planes, nudge) for nudge in nudges]
        for planes in (1, 2)
    }


Nudge = Callable[[tuple[int, ...]], "np.ndarray | float"]


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
