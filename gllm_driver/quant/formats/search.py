"""Scales that minimize a weighted squared error: rounding for trial scales, then least squares for what was rounded.

The method ggml's encoders use for the K formats: quants of several trial scales around max / levels; for each the best
scale (and minimum) given the quants in closed form; the best of all is kept. Weighted towards large
values and, where it is known, by what an error costs (`importance`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from .base import f16_at, f16_bytes, reciprocal

CHUNK = 1 << 14  # sub-blocks at a time: the trial arrays stay in the cache


def _chunks(parts: np.ndarray, importance: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for first in range(0, len(parts), CHUNK):
        part = slice(first, first + CHUNK)
        yield parts[part], None if importance is None else importance[part]


def search_minimum(parts: np.ndarray, bits: int, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scales s ≥ 0 and minimums m ≥ 0 [N] f32 of value s · quant − m, quant in 0 … 2^bits − 1, for f32 [N, n]."""
    found = [_minimum(x, w, bits) for x, w in _chunks(parts, importance)]
    if not found:
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    return np.concatenate([s for s, _ in found]), np.concatenate([m for _, m in found])


def _minimum(x: np.ndarray, importance: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    top = np.float32((1 << bits) - 1)
    size = np.sqrt((x * x).mean(axis=1, keepdims=True))
    weight = size + np.abs(x) if importance is None else importance * np.hypot(size, x)
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    width = x.max(axis=1, keepdims=True) - low
    scale, minimum = width / top, -low
    error = _error(x, weight, scale, minimum, top)
    sum_w, sum_x = weight.sum(axis=1, keepdims=True), (weight * x).sum(axis=1, keepdims=True)
    for step in np.linspace(-1, 1, 21, dtype=np.float32):
        quants = np.clip(np.rint((x - low) * ((top + step) * reciprocal(width))), 0, top)
        wq = weight * quants
        sum_q, sum_qq = wq.sum(axis=1, keepdims=True), (wq * quants).sum(axis=1, keepdims=True)
        sum_xq = (wq * x).sum(axis=1, keepdims=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        inverse = np.where(determinant > 0, reciprocal(determinant), 0)
        new_scale = (sum_w * sum_xq - sum_x * sum_q) * inverse
        new_minimum = (sum_q * sum_xq - sum_qq * sum_x) * inverse
        # a minimum cannot be negative: then only the scale is free
        new_scale = np.where(new_minimum < 0, sum_xq * reciprocal(sum_qq), new_scale)
        new_minimum = np.maximum(new_minimum, 0)
        new_error = _error(x, weight, new_scale, new_minimum, top)
        better = (new_error < error) & (new_scale > 0)
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
        error = np.where(better, new_error, error)
    return scale[:, 0], minimum[:, 0]


def _error(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, minimum: np.ndarray, top: np.float32) -> np.ndarray:
    quants = np.clip(np.rint((x + minimum) * reciprocal(scale)), 0, top)
    off = scale * quants - minimum - x
    return (weight * off * off).sum(axis=1, keepdims=True)


def search_signed(parts: np.ndarray, levels: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Scales [N] f32, of either sign, of value scale · quant, quant in −levels … levels − 1, for f32 [N, n]."""
    found = [_signed(x, w, levels) for x, w in _chunks(parts, importance)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def _signed(x: np.ndarray, importance: np.ndarray | None, levels: int) -> np.ndarray:
    largest = _largest(x)
    trials = (
        np.clip(np.rint(x * (-(levels + step) * reciprocal(largest))), -levels, levels - 1)
        for step in np.linspace(-0.9, 0.9, 19, dtype=np.float32)
    )
    return _best_scale(x, importance, trials)


def _largest(x: np.ndarray) -> np.ndarray:
    """The value of largest magnitude of each row, [N, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)


def _best_scale(x: np.ndarray, importance: np.ndarray | None, trials: Iterable[np.ndarray]) -> np.ndarray:
    """The least-squares scale of those trial quants [N, n] that it fits best, [N]. Without importance values weigh as
    their squares."""
    if importance is None:
        weight = x * x
    else:
        weight = importance * np.hypot(np.sqrt((x * x).mean(axis=1, keepdims=True)), x)
    scale = np.zeros((len(x), 1), np.float32)
    gained = np.full((len(x), 1), -1, np.float32)
    for quants in trials:
        wq = weight * quants
        sum_xq, sum_qq = (wq * x).sum(axis=1, keepdims=True), (wq * quants).sum(axis=1, keepdims=True)
        inverse = reciprocal(sum_qq)
        gain = sum_xq * sum_xq * inverse  # what the best scale for these quants takes off the error
        better = gain > gained
        scale, gained = np.where(better, sum_xq * inverse, scale), np.where(better, gain, gained)
    return scale[:, 0]


def search_levels(parts: np.ndarray, levels: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Scales [N] f32, of either sign, of value scale · level, for f32 [N, n] and ascending i8 `levels`."""
    found = [_levels(x, w, levels) for x, w in _chunks(parts, importance)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def nearest_level(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index of the level nearest to each value, u8 in the shape of x."""
    borders = (levels[1:].astype(np.float32) + levels[:-1].astype(np.float32)) / 2
    return np.searchsorted(borders, x).astype(np.uint8)


def _levels(x: np.ndarray, importance: np.ndarray | None, levels: np.ndarray) -> np.ndarray:
    largest = _largest(x)
    trials = (
        levels[nearest_level(x * (np.float32(share * end) * reciprocal(largest)), levels)]
        for end in (float(levels[0]), float(levels[-1]))
        for share in np.linspace(0.86, 1.08, 12)
    )
    return _best_scale(x, importance, trials)


def signed_scales(scales: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of a f16 number [N, 2], integers in −levels … levels − 1) whose products are nearly `scales` [N, G]."""
    header = f16_bytes(_largest(scales) / np.float32(-levels))
    return header, np.clip(np.rint(scales * reciprocal(f16_at(header, 0))), -levels, levels - 1)
