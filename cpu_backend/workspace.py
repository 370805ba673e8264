"""Scratch memory kernels work in, and the block sizes that fix it. Plain numbers: no numba here.

`shared` is one region all threads of a kernel see; `private` is one per thread.
"""

from __future__ import annotations

from collections.abc import Mapping

ROW_BLOCK = 64  # weight rows a thread takes at a time, at most,
ROW_BLOCK_NBYTES = 256 << 10  # and their bytes: they are read again for every few tokens
FEW_TOKENS = 8  # so few read the rows about once; a thread then takes up to
FEW_TOKENS_ROWS = 512  # rows (times FEW_TOKENS they fill the private buffer)
SHARES = 4  # or 1 / SHARES of its part of the matrix
TOKEN_TILE = 64  # tokens multiplied with a block of rows at a time
SPAN = 512  # context tokens of one partial attention result; fixed, so that results do not depend on the split
SCORE_BLOCK = 64  # context tokens between two updates of the running softmax
QUERY_ROWS = 32  # query rows (tokens × heads of a KV head) of a flash_attention tile, about
DIGIT_BITS = 11  # of a logit's key, per pass of a sampling histogram


def _row(n: int) -> int:
    """Bytes of a row of n activations, in the larger of the two prepared forms, rounded up to cache lines."""
    return 4 * n + 512


def query_tile(heads_per_kv: int) -> int:
    """Query tokens per flash_attention tile."""
    return max(1, QUERY_ROWS // heads_per_kv)


def workspace(op: str, v: Mapping[str, int]) -> tuple[int, int]:
    """(shared, private) bytes a kernel needs for the dims `v` of its argument struct."""
    if op == "linear":
        return v["T"] * _row(v["K"]), 4 * ROW_BLOCK * TOKEN_TILE
    if op == "fused_gate_up_silu":
        return 2 * v["T"] * _row(v["D"]), 2 * 4 * ROW_BLOCK * TOKEN_TILE
    if op == "fused_qkv_rope":
        return 2 * v["T"] * _row(v["D"]), 4 * v["Dh"] * (TOKEN_TILE + 1)
    if op == "flash_attention":
        rows = query_tile(v["QD"] // (v["HK"] * v["Dh"])) * (v["QD"] // (v["HK"] * v["Dh"]))
        return 0, 4 * rows * (3 * v["Dh"] + SCORE_BLOCK + 8)
    if op == "paged_attention":
        heads = v["QD"] // v["Dh"]
        spans = v["MP"] * v["P"] // SPAN + 1
        return 4 * v["S"] * heads * spans * (v["Dh"] + 2), 4 * heads * (2 * v["Dh"] + SCORE_BLOCK + 8)
    if op == "sample":
        return 8 * v["S"] * v["V"], 8 << DIGIT_BITS
    if op == "pack_weight":
        return 0, 4 * v["K"]
    return 0, 0
