"""rms_norm: rows in parallel; also the function the fused ops normalize a row with."""

from __future__ import annotations

import math

from numba import njit, types

from .simd import LANES, f32_at, fma, hsum, i32_at, load_f32, put_f32, splat, store_f32
from .sync import take


@njit
def subtract_mean(x, D, out):
    """out = x − mean(x), both f32 [D]; out may be x."""
    acc = splat(types.float32(0.0))
    k = 0
    while k + LANES <= D:
        acc = acc + load_f32(x + 4 * k)
        k += LANES
    total = hsum(acc)
    while k < D:
        total += f32_at(x + 4 * k)
        k += 1
    mean = total / types.float32(D)
    k = 0
    while k + LANES <= D:
        store_f32(out + 4 * k, load_f32(x + 4 * k) - splat(mean))
        k += LANES
    while k < D:
        put_f32(out + 4 * k, f32_at(x + 4 * k) - mean)
        k += 1


@njit
def normalize(x, weight, bias, D, eps, center, out):
    """out = x / sqrt(mean(x²) + eps) · weight + bias, all f32 [D]; bias may be 0, out may be x.

    With `center` x − mean(x) stands for x.
    """
    if center != 0:
        subtract_mean(x, D, out)
        x = out
    acc = splat(types.float32(0.0))
    k = 0
    while k + LANES <= D:
        v = load_f32(x + 4 * k)
        acc = fma(v, v, acc)
        k += LANES
    total = hsum(acc)
    while k < D:
        total += f32_at(x + 4 * k) * f32_at(x + 4 * k)
        k += 1
    inverse = types.float32(1.0) / types.float32(math.sqrt(total / types.float32(D) + eps))
    scale = splat(inverse)
    k = 0
    while k + LANES <= D:
        store_f32(out + 4 * k, load_f32(x + 4 * k) * scale * load_f32(weight + 4 * k))
        k += LANES
    while k < D:
        put_f32(out + 4 * k, f32_at(x + 4 * k) * inverse * f32_at(weight + 4 * k))
        k += 1
    if bias != 0:
        add_row(out, bias, D, out)


@njit
def add_row(x, y, n, out):
    """out = x + y, all f32 [n]; out may be x or y."""
    k = 0
    while k + LANES <= n:
        store_f32(out + 4 * k, load_f32(x + 4 * k) + load_f32(y + 4 * k))
        k += LANES
    while k < n:
        put_f32(out + 4 * k, f32_at(x + 4 * k) + f32_at(y + 4 * k))
        k += 1


def kernel(a, team, thread):
    nbytes = 4 * a.D
    s = take(team, 1)
    while s < a.S:
        row = s
        if a.rows != 0:
            row = i32_at(a.rows + 4 * s)
        x = a.x + row * nbytes
        if a.residual != 0:
            add_row(x, a.residual + row * nbytes, a.D, x)
        normalize(x, a.weight, a.bias, a.D, a.eps, a.center, a.out + s * nbytes)
        s = take(team, 1)
