"""fused_qkv_rope: a head of one projection is the unit of work: its norm, rotation and store need no other thread."""

from __future__ import annotations

from numba import njit

from gllm_driver.ops.fused_qkv_rope import INTERLEAVED

from .activations import FIRST_BLOCK_DTYPE, quantize_row, row_nbytes
from .formats import store_row
from .layout import kv_row
from .linear import project
from .rms_norm import add_row, normalize
from .simd import f32_at, i32_at, i64_at, put_f32
from .sync import barrier, take
from .workspace import TOKEN_TILE


@njit
def norm_rows(team, a, dtype1, dtype2, dtype3):
    """Normalize x [T, D] into shared scratch as f32 rows, and behind them as byte rows if a weight dtype wants those.

    Returns the address of the byte rows. A barrier must follow before the rows are read.
    """
    float_nbytes = row_nbytes(a.D, 0)
    byte_nbytes = row_nbytes(a.D, FIRST_BLOCK_DTYPE)
    split = team.shared + a.T * float_nbytes
    bytes_wanted = max(dtype1, max(dtype2, dtype3)) >= FIRST_BLOCK_DTYPE
    t = take(team, 1)
    while t < a.T:
        row = team.shared + t * float_nbytes
        normalize(a.x + 4 * t * a.D, a.norm, a.norm_bias, a.D, a.eps, a.center, row)
        if bytes_wanted:
            quantize_row(row, a.D, split + t * byte_nbytes)
        t = take(team, 1)
    return split


@njit
def prepared(team, split, D, dtype):
    """Address of the rows made by norm_rows, in the form a weight of `dtype` is multiplied with."""
    if dtype < FIRST_BLOCK_DTYPE:
        return team.shared
    return split


@njit
def rotate(x, cos_sin, R, style):
    """Rotate the first 2R values of a head by the angles of its token."""
    for i in range(R):
        first, second = x + 4 * i, x + 4 * (i + R)
        if style == INTERLEAVED:
            first, second = x + 8 * i, x + 8 * i + 4
        cos, sin = f32_at(cos_sin + 4 * i), f32_at(cos_sin + 4 * (R + i))
        u, v = f32_at(first), f32_at(second)
        put_f32(first, u * cos - v * sin)
        put_f32(second, v * cos + u * sin)


def kernel(a, team, thread):
    split = norm_rows(team, a, a.wq_dtype, a.wk_dtype, a.wv_dtype)
    barrier(team)
    buffer = team.private + thread * team.private_nbytes
    q_heads = a.QD // a.Dh
    token_tiles = (a.T + TOKEN_TILE - 1) // TOKEN_TILE
    item = take(team, 1)
    while item < (q_heads + 2 * a.HK) * token_tiles:
        unit, token = item // token_tiles, item % token_tiles * TOKEN_TILE
        tokens = min(TOKEN_TILE, a.T - token)
        if unit < q_heads:
            part, head, weight, dtype, bias, norm = -1, unit, a.wq, a.wq_dtype, a.bq, a.q_norm
        elif unit < q_heads + a.HK:
            part, head, weight, dtype, bias, norm = 0, unit - q_heads, a.wk, a.wk_dtype, a.bk, a.k_norm
        else:
            part, head, weight, dtype, bias, norm = 1, unit - q_heads - a.HK, a.wv, a.wv_dtype, a.bv, 0
        first = head * a.Dh
        project(team, weight, dtype, first, a.Dh, a.D, prepared(team, split, a.D, dtype), token, tokens, buffer)
        for t in range(tokens):
            y = buffer + 4 * t * a.Dh
            if bias != 0:
                add_row(y, bias + 4 * first, a.Dh, y)
            if norm != 0:
                normalize(y, norm, 0, a.Dh, a.qk_eps, 0, y)
            if part != 1:
                rotate(y, a.cos_sin + 8 * (token + t) * a.R, a.R, a.rope_style)
            if part < 0:
                store_row(a.q + 4 * ((token + t) * a.QD + first), 0, y, a.Dh)
            else:
                position = i64_at(a.positions + 8 * (token + t))
                slot = kv_row(a, i32_at(a.seq + 4 * (token + t)), position, part, head)
                store_row(slot, a.kv_dtype, y, a.Dh)
        item = take(team, 1)
