"""The committed results of transformers on the rows of tiny_models, and how results are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import tiny_models

PATH = Path(__file__).parents[1] / "data" / "goldens" / "tiny_models.npz"

# Prompt and greedy tokens are one sequence of 56. First tokens, both sides of 12 and 16 (windows and pages), of 32, of
# the end of the prompt, and of the end.
POSITIONS = (0, 1, 2, 11, 12, 15, 16, 31, 32, 38, 39, 40, 54, 55)


@dataclass(frozen=True)
class Golden:
    """One row's results."""

    fingerprint: str  # of the model and the prompt they belong to
    tokens: list[int]  # prompt and greedy continuation
    greedy: list[int]
    logits: np.ndarray  # [len(POSITIONS), vocab] f32, after tokens[: position + 1]
    rounding: dict[str, float]  # "f16", "bf16": rms_error of transformers' own logits when it computes in that type


def save(goldens: dict[str, Golden], path: Path = PATH) -> None:
    arrays: dict[str, Any] = {}
    for name, golden in goldens.items():
        arrays[f"{name}/fingerprint"] = np.array(golden.fingerprint)
        arrays[f"{name}/greedy"] = np.array(golden.greedy, dtype=np.int32)
        arrays[f"{name}/logits"] = golden.logits.astype(np.float32)
        arrays[f"{name}/rounding"] = np.array([golden.rounding["f16"], golden.rounding["bf16"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def load(row: tiny_models.Row, path: Path = PATH) -> Golden:
    with np.load(path) as file:
        greedy = [int(token) for token in file[f"{row.name}/greedy"]]
        f16, bf16 = file[f"{row.name}/rounding"].tolist()
        return Golden(
            fingerprint=str(file[f"{row.name}/fingerprint"]),
            tokens=tiny_models.prompt(row) + greedy,
            greedy=greedy,
            logits=file[f"{row.name}/logits"],
            rounding={"f16": f16, "bf16": bf16},
        )


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest over positions of ‖actual − expected‖ / ‖expected‖; NaN if any element is.

    Compare it as `not (error <= bound)`, which NaN does not pass.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"logits of shape {actual.shape} are compared with {expected.shape}")
    difference = np.linalg.norm(actual.astype(np.float64) - expected, axis=-1)
    return float(np.max(difference / np.linalg.norm(expected.astype(np.float64), axis=-1)))


def rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual − expected‖ / ‖expected‖ over all positions together: the size of rounding noise, which at one position
    is a matter of luck. NaN if any element is."""
    if actual.shape != expected.shape:
        raise ValueError(f"logits of shape {actual.shape} are compared with {expected.shape}")
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    return float(difference / np.linalg.norm(expected.astype(np.float64)))


def check_close(actual: np.ndarray, expected: np.ndarray, bound: float, what: str) -> None:
    """AssertionError with figures unless the relative error of every position is at most `bound` and no single logit is
    off by more than 4 × `bound` times the position's largest logit."""
    error = relative_error(actual, expected)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    single = float(np.max(np.abs(actual.astype(np.float64) - expected) / largest))
    if not (error <= bound) or not (single <= 4 * bound):
        raise AssertionError(f"{what}: relative error {error:.3g} (bound {bound:.3g}), worst logit {single:.3g}")
