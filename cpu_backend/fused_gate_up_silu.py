"""fused_gate_up_silu: both projections of a block of rows, then activation and product, before anything is stored."""

from __future__ import annotations

from numba import njit, types

from .fused_qkv_rope import norm_rows, prepared
from .linear import project, rows_per_block
from .rms_norm import add_row
from .simd import LANES, f32_at, lane0, load_f32, put_f32, splat, store_f32, vexp
from .sync import barrier, take
from .workspace import ROW_BLOCK, TOKEN_TILE

GELU_TANH = 1


@njit
def activate(x, activation):
    """SiLU x·σ(x), or GELU by its tanh form: x·σ(2u), u = √(2/π)·(x + 0.044715 x³)."""
    arg = x
    if activation == GELU_TANH:
        cubic = x * x * x * splat(types.float32(0.044715))
        arg = (x + cubic) * splat(types.float32(2.0 * 0.7978845608028654))
    return x / (splat(types.float32(1.0)) + vexp(splat(types.float32(0.0)) - arg))


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
    split = norm_rows(team, a.x, a.norm, a.T, a.D, a.eps, a.gate_dtype, a.up_dtype, a.up_dtype)
    barrier(team)
    gate_x = prepared(team, split, a.D, a.gate_dtype)
    up_x = prepared(team, split, a.D, a.up_dtype)
    gate = team.private + thread * team.private_nbytes
    up = gate + 4 * ROW_BLOCK * TOKEN_TILE
    block = rows_per_block(team, a.F, a.D, a.gate_dtype, a.T)
    row_blocks = (a.F + block - 1) // block
    token_tiles = (a.T + TOKEN_TILE - 1) // TOKEN_TILE
    item = take(team, 1)
    while item < row_blocks * token_tiles:
        first, token = item // token_tiles * block, item % token_tiles * TOKEN_TILE
        rows, tokens = min(block, a.F - first), min(TOKEN_TILE, a.T - token)
        project(team, a.gate, a.gate_dtype, first, rows, a.D, gate_x, token, tokens, gate)
        project(team, a.up, a.up_dtype, first, rows, a.D, up_x, token, tokens, up)
        for t in range(tokens):
            row = 4 * t * rows
            if a.gate_bias != 0:
                add_row(gate + row, a.gate_bias + 4 * first, rows, gate + row)
                add_row(up + row, a.up_bias + 4 * first, rows, up + row)
            gated_row(gate + row, up + row, rows, a.activation, a.out + 4 * ((token + t) * a.F + first))
        item = take(team, 1)
