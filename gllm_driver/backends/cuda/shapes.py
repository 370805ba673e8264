"""Shapes that steps share: few enough that each is recorded once, close enough that the padding costs little."""

from __future__ import annotations

EXACT = 8  # up to here a row more can change what a weight-streaming kernel does, and shapes are few


def bucket(n: int) -> int:
    """The least shape of at least `n`: all up to 8, four to a doubling up to 128, then eight to a doubling."""
    if n <= EXACT:
        return n
    octave = (n - 1).bit_length() - 1  # 2**octave < n ≤ 2**(octave + 1)
    step = 1 << (octave - (2 if n <= 128 else 3))
    return -(-n // step) * step


def table_width(num_pages: int, limit: int) -> int:
    """A page-table width that many sequences share, so that they share programs: a power of two, or `limit`."""
    return min(1 << max(num_pages - 1, 0).bit_length(), max(limit, num_pages))
