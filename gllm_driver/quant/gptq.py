"""Rounding by what a matrix does to real inputs: GPTQ, then coordinate descent on the same objective.

The error of a row w quantized as v is (w − v) H (w − v)ᵀ, H = Σ x xᵀ over the inputs of a calibration text. GPTQ
(Frantar et al. 2022) rounds column after column and moves those that follow so as to make up for each error. What it
leaves is improved block after block: s and m by least squares under H, then each quant given all others.
"""

from __future__ import annotations

import numpy as np

from .formats.base import reciprocal
from .grid import Grid

DAMPING = 0.01  # share of the mean of H's diagonal that is added to it
SWEEPS = 2
NO_NUMBERS = "the inputs hold NaN or infinities, or values whose squares overflow"


class Curvature:
    """H, f32 [K, K], ready for use: damped, and the upper factor U of its inverse, H⁻¹ = Uᵀ U.

    Raises ValueError when H holds a NaN or an infinity.
    """

    def __init__(self, h: np.ndarray) -> None:
        if not np.isfinite(h).all():
            raise ValueError(NO_NUMBERS)
        diagonal = np.diag_indices(len(h))
        mean = float(h[diagonal].mean()) or 1.0
        self.h = h.astype(np.float32)
        self.h[diagonal] += np.float32(DAMPING * mean)
        damping = 0.0
        while True:
            try:
                # H = R Rᵀ with R upper, from the Cholesky factor of H read backwards; U = R⁻¹.
                lower = np.linalg.cholesky(self.h[::-1, ::-1].astype(np.float64))
                break
            except np.linalg.LinAlgError:  # far from full rank: few tokens
                damping = damping * 10 or DAMPING * mean
                self.h[diagonal] += np.float32(damping)
        self.factor = np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1].astype(np.float32))


def gptq(grid: Grid, rows: np.ndarray, curvature: Curvature, sweeps: int = SWEEPS) -> np.ndarray:
    """rows f32 [N, K] → blocks u8 [N, K / block_size · block_nbytes]. Rows do not depend on each other."""
    solution = _rounded(grid, rows, curvature.factor)
    for _ in range(sweeps):
        _sweep(grid, rows, curvature.h, solution)
    return solution.packed(grid)


class _Solution:
    """What was chosen for N rows of K elements: u and values [N, K], s and m [N, K / block_size], f32."""

    def __init__(self, shape: tuple[int, int], block_size: int) -> None:
        N, K = shape
        self.u, self.values = np.empty((N, K), np.float32), np.empty((N, K), np.float32)
        self.s, self.m = (np.empty((N, K // block_size), np.float32) for _ in range(2))

    def packed(self, grid: Grid) -> np.ndarray:
        blocks = grid.pack(self.u.reshape(-1, grid.block_size), self.s.reshape(-1, 1), self.m.reshape(-1, 1))
        return blocks.reshape(len(self.u), -1)


def _rounded(grid: Grid, rows: np.ndarray, factor: np.ndarray) -> _Solution:
    """GPTQ. The scales of a block are searched when it is reached; an element weighs as its own error costs."""
    left, size = rows.copy(), grid.block_size
    solution = _Solution(rows.shape, size)
    cost = 1 / np.square(np.diag(factor))
    for block, first in enumerate(range(0, rows.shape[1], size)):
        end = first + size
        s, m = grid.search(left[:, first:end], cost[None, first:end])
        solution.s[:, block], solution.m[:, block] = s[:, 0], m[:, 0]
        errors = np.empty((len(rows), size), np.float32)
        for j in range(first, end):
            u = grid.round(left[:, j : j + 1], s, m)
            value = s * u + m
            solution.u[:, j], solution.values[:, j] = u[:, 0], value[:, 0]
            errors[:, j - first] = (left[:, j] - value[:, 0]) / factor[j, j]
            left[:, j + 1 : end] -= errors[:, j - first, None] * factor[j, j + 1 : end]
        left[:, end:] -= errors @ factor[first:end, end:]
    return solution


def _sweep(grid: Grid, rows: np.ndarray, h: np.ndarray, solution: _Solution) -> None:
    """Improve every block once, given the others."""
    size = grid.block_size
    pull = (rows - solution.values) @ h  # minus half the gradient by each value
    for block, first in enumerate(range(0, rows.shape[1], size)):
        part = slice(first, first + size)
        near, before = h[part, part], solution.values[:, part].copy()
        local = np.ascontiguousarray(pull[:, part])
        _refit(grid, near, local, solution, block, part)
        s, m = solution.s[:, block : block + 1], solution.m[:, block : block + 1]
        for i in range(size):
            j = first + i
            u = grid.round(solution.values[:, j : j + 1] + local[:, i : i + 1] / near[i, i], s, m)
            value = s * u + m
            local -= (value - solution.values[:, j : j + 1]) * near[i]
            solution.u[:, j], solution.values[:, j] = u[:, 0], value[:, 0]
        pull -= (solution.values[:, part] - before) @ h[part]


def _refit(grid: Grid, near: np.ndarray, local: np.ndarray, solution: _Solution, block: int, part: slice) -> None:
    """Move s and m of a block to where the error is least for its quants, in the rows where that helps."""
    s, m = solution.s[:, block : block + 1], solution.m[:, block : block + 1]
    u, values = solution.u[:, part], solution.values[:, part]
    if grid.kind:
        u_near = u @ near
        a, b, c = _dot(u_near, u), u_near.sum(axis=1, keepdims=True), near.sum()
        p, q = _dot(u, local), local.sum(axis=1, keepdims=True)
        determinant = a * c - b * b
        free = determinant > 1e-6 * a * c
        inverse = reciprocal(np.where(free, determinant, 1))
        ds = np.where(free, (c * p - b * q) * inverse, 0)
        dm = np.where(free, (a * q - b * p) * inverse, q / c)
    else:
        centered = u - np.float32(grid.center)
        ds = _dot(centered, local) * reciprocal(_dot(centered @ near, centered))
        dm = np.float32(0)
    new_s, new_m = grid.stored(s + ds, m + dm)
    change = new_s * u + new_m - values
    moved = change @ near
    better = _dot(change, moved) < 2 * _dot(change, local)
    solution.s[:, block] = np.where(better, new_s, s)[:, 0]
    solution.m[:, block] = np.where(better, new_m, m)[:, 0]
    solution.values[:, part] = np.where(better, values + change, values)
    local -= np.where(better, moved, 0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", a, b)[:, None]
