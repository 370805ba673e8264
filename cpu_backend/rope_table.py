"""rope_table: cosines and sines of position · frequency, the angle in f64."""

from __future__ import annotations

import math

from numba import types

from .simd import f64_at, i64_at, put_f32
from .sync import take


def kernel(a, team, thread):
    t = take(team, 1)
    while t < a.T:
        position = types.float64(i64_at(a.positions + 8 * t))
        cos, sin = a.cos_sin + 8 * t * a.R, a.cos_sin + 8 * t * a.R + 4 * a.R
        for i in range(a.R):
            angle = position * f64_at(a.inv_freq + 8 * i)
            put_f32(cos + 4 * i, types.float32(math.cos(angle)) * a.scale)
            put_f32(sin + 4 * i, types.float32(math.sin(angle)) * a.scale)
        t = take(team, 1)
