"""Half-quadratic quantization: scales that minimize |error|^p, p < 1, so that few large errors matter less than many.

Badri and Shaji 2023 ("Half-Quadratic Quantization of Large Machine Learning Models"): the error is split into a sparse
part, found by a generalized soft threshold, and a rest that the scales are fitted to. They move the zero point alone;
here scale and zero point (or minimum) follow in turn, each time by least squares.
"""

from __future__ import annotations

import numpy as np

from .grid import CHUNK_ELEMENTS, Grid

P = 0.7
_STEPS = 20
_BETA, _GROWTH = 10.0, 1.01  # of the penalty that ties both parts together


def half_quadratic(grid: Grid, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s and m, f32 [N, 1] each, for blocks x [N, block_size]."""
    step = max(1, CHUNK_ELEMENTS // grid.block_size)
    found = [_solve(grid, x[i : i + step]) for i in range(0, len(x), step)]
    return np.concatenate([s for s, _ in found]), np.concatenate([m for _, m in found])


def _solve(grid: Grid, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ones, size = np.ones_like(x), x.std(axis=1, keepdims=True) + np.float32(1e-30)
    s, m = grid.stored(*grid.extremes(x, with_zero=grid.kind == "z"))
    best_s, best_m, least = s, m, np.full_like(s, np.inf)
    beta = np.float32(_BETA)
    for _ in range(_STEPS):
        u = grid.round(x, s, m)
        off = x - (s * u + m)
        magnitude = np.abs(off) / size
        error = (magnitude**P).sum(axis=1, keepdims=True)
        better = error < least
        best_s, best_m, least = np.where(better, s, best_s), np.where(better, m, best_m), np.where(better, error, least)
        sparse = np.maximum(magnitude - (magnitude + np.float32(1e-8)) ** (P - 1) / beta, 0) * np.sign(off) * size
        s, m = grid.stored(*grid.least_squares(x - sparse, ones, u))
        beta *= _GROWTH
    return best_s, best_m
