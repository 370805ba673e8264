"""Rotary frequencies (Su et al. 2021, RoFormer) and the ways they are stretched for long contexts."""

from __future__ import annotations

import math

import numpy as np

from ..errors import ModelFormatError
from .arch import Arch, RopeScaling


def rope_inv_freq(arch: Arch, factors: np.ndarray | None, context_length: int) -> tuple[np.ndarray, float]:
    """Angles per position of each rotated pair, and the factor that cosines and sines are multiplied with.

    Returns f64 [rotary_dim / 2] and the attention factor. `factors` (any float type, [rotary_dim / 2]) is the tensor in
    slot `rope_factors`, for kind "factors" only. `context_length` is the number of tokens the KV cache has room for;
    only kind "ntk" with an `original_context_length` looks at it.

    Sources: linear — Chen et al. 2023 (arXiv 2306.15595). ntk — base × s^(d / (d − 2)), so that the last frequency is
    divided by s; with an original length L the scale follows the length in use, s = factor · length / L − (factor − 1),
    as the "dynamic" type of Hugging Face configs. yarn — Peng et al. 2023 (arXiv 2309.00071), with the ramp over the
    pair index between whole indices, as in the authors' code. llama3 — the Llama 3.1 model card's reference code.

    Raises ModelFormatError when the factors do not fit.
    """
    scaling = arch.rope_scaling
    dim = arch.rotary_dim
    pair = np.arange(dim // 2, dtype=np.float64)
    inv_freq = arch.rope_theta ** (-2.0 * pair / dim)
    attention_factor = 1.0
    if (factors is not None) != (scaling.kind == "factors"):
        raise ModelFormatError(
            f"rope factors {'missing' if factors is None else 'given'} for RoPE scaling {scaling.kind!r}"
        )
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    elif scaling.kind == "yarn":
        inv_freq = _yarn(inv_freq, scaling, dim, arch.rope_theta)
        attention_factor = yarn_attention_factor(scaling.factor)
    elif scaling.kind == "ntk":
        stretch = _ntk_stretch(scaling, context_length)
        inv_freq = (
            (arch.rope_theta * stretch ** (dim / (dim - 2))) ** (-2.0 * pair / dim) if stretch > 1.0 else inv_freq
        )
    elif factors is not None:
        divisors = np.asarray(factors, dtype=np.float64)
        if divisors.shape != inv_freq.shape or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise ModelFormatError(f"rope factors must be {inv_freq.size} positive numbers", tensor="rope_factors")
        inv_freq = inv_freq / divisors
    if scaling.attention_factor is not None:
        attention_factor = scaling.attention_factor
    return inv_freq, attention_factor


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The temperature correction of YaRN (its equation 22), 0.1 · mscale · ln(factor) + 1, on cosines and sines."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _ntk_stretch(scaling: RopeScaling, context_length: int) -> float:
    if not scaling.original_context_length:
        return scaling.factor
    return scaling.factor * context_length / scaling.original_context_length - (scaling.factor - 1.0)


def _llama3(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Keep wavelengths that fit high_freq_factor times into the original context, divide those that fit less than
    low_freq_factor times, and blend in between."""
    rotations = scaling.original_context_length * inv_freq / (2.0 * math.pi)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * inv_freq + (1.0 - keep) * inv_freq / scaling.factor


def _yarn(inv_freq: np.ndarray, scaling: RopeScaling, dim: int, theta: float) -> np.ndarray:
    def pair_with(rotations: float) -> float:
        """The (fractional) pair index whose angle goes round `rotations` times in the original context."""
        return dim * math.log(scaling.original_context_length / (rotations * 2.0 * math.pi)) / (2.0 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # a step then, and no division by zero
    interpolate = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return interpolate * inv_freq / scaling.factor + (1.0 - interpolate) * inv_freq
