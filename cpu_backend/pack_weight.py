"""pack_weight: rows in parallel, each decoded to f32, looked through, stored. Packed types are for devices."""

from __future__ import annotations

from numba import njit, types

from .formats import store_row
from .layout import dtype_row_nbytes
from .simd import call_address, f32_at, i64_at, put_i32
from .sync import take


@njit
def first_bad(x, n):
    """Index of the first NaN or infinity among n f32, −1 if there is none."""
    for k in range(n):
        if f32_at(x + 4 * k) - f32_at(x + 4 * k) != types.float32(0.0):
            return k
    return -1


def kernel(a, team, thread):
    dequantize = i64_at(team.dequantize + 8 * a.raw_dtype)
    raw_nbytes, out_nbytes = dtype_row_nbytes(a.raw_dtype, a.K), dtype_row_nbytes(a.out_dtype, a.K)
    row = team.private + thread * team.private_nbytes
    n = take(team, 1)
    while n < a.N:
        call_address(dequantize, (a.raw + n * raw_nbytes, a.K, row))
        store_row(a.out + n * out_nbytes, a.out_dtype, row, a.K)
        put_i32(a.bad + 4 * n, first_bad(row, a.K))
        n = take(team, 1)
