"""Passes over stored weights at load time: are they all numbers, and the same values in another float type."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .blocks import block_format
from .formats import LOAD, store_row
from .matmul import ITEM_NBYTES
from .simd import LANES, f16_at, fma, hsum, put_f32, splat, store_f32

CHUNK = 4096  # elements checked at a time; divides into whole vectors of every width


def make_first_bad(dtype: str) -> tuple[Callable, tuple]:
    """first_bad(address, n): index of the first NaN or infinite element (or block scale) of n; −1: all are finite."""
    format = block_format(dtype)
    if format is not None:
        nbytes, block_size = format.block_nbytes, format.block_size
        first_half, last_half = format.halves[0], format.halves[-1]

        def first_bad_block(address, n):
            for block in range(n // block_size):
                at = address + nbytes * block
                d, a = f16_at(at + first_half), f16_at(at + last_half)
                if (d - d) + (a - a) != types.float32(0.0):
                    return block_size * block
            return -1

        return first_bad_block, (types.int64, types.int64)
    load, one = LOAD[dtype]
    size = ITEM_NBYTES[dtype]

    def first_bad(address, n):
        start = 0
        while start < n:
            stop = min(start + CHUNK, n)
            zero = splat(types.float32(0.0))
            total, k = zero, start
            while k + LANES <= stop:
                total = fma(load(address + size * k), zero, total)  # 0 · NaN and 0 · inf are NaN
                k += LANES
            suspicious = hsum(total) != types.float32(0.0)
            k = start if suspicious else k
            while k < stop:
                x = one(address + size * k)
                if x - x != types.float32(0.0):
                    return k
                k += 1
            start = stop
        return -1

    return first_bad, (types.int64, types.int64)


def make_convert(dtype: str) -> tuple[Callable, tuple]:
    """convert(address, n, out, out_dtype, scratch): n floats to the float dtype of a code; scratch is f32 [CHUNK]."""
    load, one = LOAD[dtype]
    size = ITEM_NBYTES[dtype]

    def convert(address, n, out, out_dtype, scratch):
        out_size = 4 if out_dtype == 0 else 2
        start = 0
        while start < n:
            count = min(CHUNK, n - start)
            k = 0
            while k + LANES <= count:
                store_f32(scratch + 4 * k, load(address + size * (start + k)))
                k += LANES
            while k < count:
                put_f32(scratch + 4 * k, one(address + size * (start + k)))
                k += 1
            store_row(out + out_size * start, out_dtype, scratch, count)
            start += count
        return 0

    return convert, (types.int64,) * 5
