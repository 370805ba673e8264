"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the draw made from it."""

from __future__ import annotations

import math

from numba import njit, types

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


@njit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on a counter of four 32-bit words with a key of two; all arguments and results are uint64."""
    mask = types.uint64(_MASK)
    for _ in range(10):
        p0 = types.uint64(_MULTIPLIERS[0]) * c0
        p1 = types.uint64(_MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + types.uint64(_WEYL[0])) & mask
        k1 = (k1 + types.uint64(_WEYL[1])) & mask
    return c0, c1, c2, c3


@njit
def gumbel(word):
    """−ln(−ln u) for u = (word's top 23 bits + ½) · 2⁻²³, exact in f32 and never 0 or 1."""
    u = (types.float32(word >> types.uint64(9)) + types.float32(0.5)) * types.float32(2.0**-23)
    return types.float32(-math.log(-math.log(u)))
