"""linear: rows of the weight are shared out in blocks; a block is multiplied with a tile of tokens at a time."""

from __future__ import annotations

from numba import njit

from .activations import copy_row, prepare_rows, row_nbytes
from .layout import dtype_row_nbytes
from .rms_norm import add_row
from .simd import call_address, i64_at
from .sync import barrier, take
from .workspace import FEW_TOKENS, FEW_TOKENS_ROWS, ROW_BLOCK, ROW_BLOCK_NBYTES, SHARES, TOKEN_TILE


@njit
def rows_per_block(team, N, K, dtype, T):
    """Weight rows a thread takes at a time: as many as stay in its L2 cache while tile after tile of tokens passes.

    Few tokens read them once: then a thread takes a long run, which memory delivers faster, and few runs end together.
    """
    if T <= FEW_TOKENS:
        return min(FEW_TOKENS_ROWS, max(8, N // (SHARES * team.num_threads) // 8 * 8))
    return min(ROW_BLOCK, max(8, ROW_BLOCK_NBYTES // dtype_row_nbytes(dtype, K) // 8 * 8))


@njit
def project(team, weight, dtype, first, rows, K, x, token, tokens, out):
    """out [tokens, rows] f32 = prepared activations x of `tokens` tokens from `token` on, times weight rows."""
    stride = row_nbytes(K, dtype)
    w_stride = dtype_row_nbytes(dtype, K)
    call_address(
        i64_at(team.matmul + 8 * dtype),
        (weight + first * w_stride, w_stride, rows, x + token * stride, stride, tokens, K, out, 4 * rows),
    )


def kernel(a, team, thread):
    x = prepare_rows(team, a.x, a.T, a.K, a.weight_dtype, team.shared)
    barrier(team)
    buffer = team.private + thread * team.private_nbytes
    block = rows_per_block(team, a.N, a.K, a.weight_dtype, a.T)
    row_blocks = (a.N + block - 1) // block
    token_tiles = (a.T + TOKEN_TILE - 1) // TOKEN_TILE
    item = take(team, 1)
    while item < row_blocks * token_tiles:
        first, token = item // token_tiles * block, item % token_tiles * TOKEN_TILE
        rows, tokens = min(block, a.N - first), min(TOKEN_TILE, a.T - token)
        project(team, a.weight, a.weight_dtype, first, rows, a.K, x, token, tokens, buffer)
        for t in range(tokens):
            y = buffer + 4 * t * rows
            offset = 4 * ((token + t) * a.N + first)
            if a.bias != 0:
                add_row(y, a.bias + 4 * first, rows, y)
            if a.residual != 0:
                add_row(y, a.residual + offset, rows, a.out + offset)
            else:
                copy_row(y, rows, a.out + offset)
        item = take(team, 1)
