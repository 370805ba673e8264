"""kv_pages: a page is the unit of work, copied eight bytes at a time."""

from __future__ import annotations

from numba import njit

from gllm_driver.ops.kv_pages import GATHER

from .simd import i32_at, i64_at, put_i64, put_u8, u8_at
from .sync import take


@njit
def copy(to, source, nbytes):
    k = 0
    while k + 8 <= nbytes:
        put_i64(to + k, i64_at(source + k))
        k += 8
    while k < nbytes:
        put_u8(to + k, u8_at(source + k))
        k += 1


def kernel(a, team, thread):
    n = take(team, 1)
    while n < a.N:
        page, item = a.kv + i32_at(a.pages + 4 * n) * a.B, a.buffer + n * a.B
        if a.direction == GATHER:
            copy(item, page, a.B)
        else:
            copy(page, item, a.B)
        n = take(team, 1)
