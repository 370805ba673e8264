"""embedding: each token's row of the matrix, dequantized by the function of its dtype."""

from __future__ import annotations

from .layout import dtype_row_nbytes
from .simd import call_address, i32_at, i64_at
from .sync import take


def kernel(a, team, thread):
    dequantize = i64_at(team.dequantize + 8 * a.weight_dtype)
    row_nbytes = dtype_row_nbytes(a.weight_dtype, a.D)
    t = take(team, 1)
    while t < a.T:
        row = a.weight + i32_at(a.ids + 4 * t) * row_nbytes
        call_address(dequantize, (row, a.D, a.out + 4 * t * a.D))
        t = take(team, 1)
