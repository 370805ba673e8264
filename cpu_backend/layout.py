"""Sizes kernels need: bytes per stored row by dtype code, from the one table in gllm_driver/types.py."""

from __future__ import annotations

from numba import njit

from gllm_driver.types import DTYPES

_BLOCK = tuple(next((d.block_size for d in DTYPES.values() if d.code == c), 1) for c in range(64))
_NBYTES = tuple(next((d.block_nbytes for d in DTYPES.values() if d.code == c), 0) for c in range(64))


@njit
def dtype_row_nbytes(dtype, n):
    """Bytes of a row of n elements of the dtype with this code."""
    return n // _BLOCK[dtype] * _NBYTES[dtype]
