"""Where things lie: bytes per stored row by dtype code, and the row of a token in the paged KV cache."""

from __future__ import annotations

from numba import njit

from gllm_driver.types import DTYPES

from .simd import i32_at
from .team import MAX_DTYPES

_BLOCK = tuple(next((d.block_size for d in DTYPES.values() if d.code == c), 1) for c in range(MAX_DTYPES))
_NBYTES = tuple(next((d.block_nbytes for d in DTYPES.values() if d.code == c), 0) for c in range(MAX_DTYPES))


@njit
def dtype_row_nbytes(dtype, n):
    """Bytes of a row of n elements of the dtype with this code."""
    return n // _BLOCK[dtype] * _NBYTES[dtype]


@njit
def kv_row(a, sequence, position, part, head):
    """Address of the cached key (part 0) or value (part 1) of a token, for one KV head.

    `a` is the argument struct of any op with kv [NP, L, 2, HK, P, Dh] and page_table [S, MP].
    """
    page = i32_at(a.page_table + 4 * (sequence * a.MP + position // a.P))
    row = ((((page * a.L + a.layer) * 2 + part) * a.HK) + head) * a.P + position % a.P
    return a.kv + row * dtype_row_nbytes(a.kv_dtype, a.Dh)
