"""pool_rows: a piece is the unit of work; its rows are added to the sum one after another."""

from __future__ import annotations

from numba import njit, types

from gllm_driver.ops.pool_rows import BEGINS, COUNT, FIRST, ROW

from .rms_norm import add_row
from .simd import i32_at, put_f32
from .sync import take

PIECE_NBYTES = 16


@njit
def clear(out, n):
    """out = 0, f32 [n]."""
    for k in range(n):
        put_f32(out + 4 * k, types.float32(0.0))


def kernel(a, team, thread):
    p = take(team, 1)
    while p < a.P:
        piece = a.pieces + p * PIECE_NBYTES
        count = i32_at(piece + 4 * COUNT)
        total = a.sums + i32_at(piece + 4 * ROW) * a.D * 4
        if count > 0 and i32_at(piece + 4 * BEGINS) != 0:
            clear(total, a.D)
        x = a.x + i32_at(piece + 4 * FIRST) * a.D * 4
        for _ in range(count):
            add_row(total, x, a.D, total)
            x += 4 * a.D
        p = take(team, 1)
