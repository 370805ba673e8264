"""fused_gate_up_silu: both projections of a block of rows, then activation and product, before anything is stored."""

from __future__ import annotations

from numba import njit, types

from .fused_qkv_rope import norm_rows, prepared
from .linear import project, rows_per_block
from .rms_norm import add_row
from .simd import LANES, choose_negative, f32_at, fma, lane0, load_f32, put_f32, splat, store_f32, vexp, vmax
from .sync import barrier, take
from .workspace import ROW_BLOCK, TOKEN_TILE

GELU_TANH, GELU = 1, 2


@njit
def f32(x):
    return splat(types.float32(x))


@njit
def gelu(x):
    """x·Φ(x), Φ(−|x|) being erfc(z) / 2 at z = |x| / √2.

    erfc(z) = t·exp(p(t) − z²) with t = 1 / (1 + z/2) and a polynomial p fitted to its logarithm, within 1e-7.
    """
    z = vmax(x, f32(0.0) - x) * f32(0.7071067811865476)
    t = f32(1.0) / fma(z, f32(0.5), f32(1.0))
    p = f32(0.17087277767190606)
    for coefficient in (
        -0.8221522343878044,
        1.4885158891658385,
        -1.1352040002836414,
        0.27886808440445215,
        -0.18628806164136785,
        0.09678418948395508,
        0.3740919597194165,
        1.00002368015776,
        -1.265512225141606,
    ):
        p = fma(p, t, f32(coefficient))
    tail = f32(0.5) * t * vexp(p - z * z)
    return x * choose_negative(x, tail, f32(1.0) - tail)


@njit
def activate(x, activation):
    """SiLU x·σ(x), GELU, or GELU by its tanh form: x·σ(2u), u = √(2/π)·(x + 0.044715 x³)."""
    if activation == GELU:
        return gelu(x)
    arg = x
    if activation == GELU_TANH:
        cubic = x * x * x * splat(types.float32(0.044715))
        arg = (x + cubic) * splat(types.float32(2.0 * 0.7978845608028654))
    return x / (splat(types.float32(1.0)) + vexp(splat(types.float32(0.0)) - arg))


@njit
def activated_row(x, n, activation, out):
    """out = act(x), both f32 [n]."""
    k = 0
    while k + LANES <= n:
        store_f32(out + 4 * k, activate(load_f32(x + 4 * k), activation))
        k += LANES
    while k < n:
        put_f32(out + 4 * k, lane0(activate(splat(f32_at(x + 4 * k)), activation)))
        k += 1


@njit
def gated_row(gate, up, n, activation, out):
    """out = act(gate) · up, all f32 [n]."""
    k = 0
    while k + LANES <= n:
        store_f32(out + 4 * k, activate(load_f32(gate + 4 * k), activation) * load_f32(up + 4 * k))
        k += LANES
    while k < n:
        y = activate(splat(f32_at(gate + 4 * k)), activation) * splat(f32_at(up + 4 * k))
        put_f32(out + 4 * k, lane0(y))
        k += 1


def kernel(a, team, thread):
    gate_dtype = a.up_dtype
    if a.gate != 0:
        gate_dtype = a.gate_dtype
    split = norm_rows(team, a, gate_dtype, a.up_dtype, a.up_dtype)
    barrier(team)
    gate_x = prepared(team, split, a.D, gate_dtype)
    up_x = prepared(team, split, a.D, a.up_dtype)
    gate = team.private + thread * team.private_nbytes
    up = gate + 4 * ROW_BLOCK * TOKEN_TILE
    block = rows_per_block(team, a.F, a.D, gate_dtype, a.T)
    row_blocks = (a.F + block - 1) // block
    token_tiles = (a.T + TOKEN_TILE - 1) // TOKEN_TILE
    item = take(team, 1)
    while item < row_blocks * token_tiles:
        first, token = item // token_tiles * block, item % token_tiles * TOKEN_TILE
        rows, tokens = min(block, a.F - first), min(TOKEN_TILE, a.T - token)
        if a.gate != 0:
            project(team, a.gate, gate_dtype, first, rows, a.D, gate_x, token, tokens, gate)
        project(team, a.up, a.up_dtype, first, rows, a.D, up_x, token, tokens, up)
        for t in range(tokens):
            row = 4 * t * rows
            out = a.out + 4 * ((token + t) * a.F + first)
            if a.up_bias != 0:
                add_row(up + row, a.up_bias + 4 * first, rows, up + row)
            if a.gate == 0:
                activated_row(up + row, rows, a.activation, out)
                continue
            if a.gate_bias != 0:
                add_row(gate + row, a.gate_bias + 4 * first, rows, gate + row)
            gated_row(gate + row, up + row, rows, a.activation, out)
        item = take(team, 1)
