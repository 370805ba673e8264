"""Activations as matmul wants them: f32 rows, or rows quantized to bytes for block-quantized weights.

A quantized row of K values (K a multiple of 32, padded to whole groups of 256, 8 blocks each) lies group by group as
    bytes  i8  [4, 8, 8]  q = round(x / d), d = max|x| / 127 per block of 32: the eight bytes 8j … 8j + 7 of block s
                          at [j, s], as unpack.py brings weights
    scale  f32 [8, 2]     d of each block, twice: the lanes in which a block's products end when four are summed
    sum    i32 [8, 2]     −Σ of the 16 q that are multiplied in a lane: what a weight's zero point is multiplied with
    second i32 [8, 2]     the same of pieces 2 and 3 alone
    total  f32 [8, 2]     d · Σ: what a weight's offset is multiplied with
Padding has q = 0 and d = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .blocks import GROUP, SUB_BLOCK
from .emit import i64
from .simd import (
    F32,
    I8,
    I32,
    LANES,
    call_llvm,
    f32_at,
    llvm_splat,
    load_f32,
    pointer,
    put_f32,
    put_i64,
    store_f32,
)
from .sync import take

SCALES_AT, SUMS_AT, SECOND_SUMS_AT, TOTALS_AT = GROUP, GROUP + 64, GROUP + 128, GROUP + 192
GROUP_NBYTES = GROUP + 256
FIRST_BLOCK_DTYPE = 8  # dtype codes from here on are block formats (gllm_driver/types.py)


@njit
def row_nbytes(K, dtype):
    """Bytes of one prepared row of K activations for a weight of this dtype code, a multiple of 64."""
    if dtype < FIRST_BLOCK_DTYPE:
        return (K * 4 + 63) // 64 * 64
    return (K + GROUP - 1) // GROUP * GROUP_NBYTES


@intrinsic
def _quantize_block(typingctx: Any, x: Any, out: Any) -> Any:
    """Quantize 32 f32 at x to block 0 of the group at `out` (later blocks: 8 bytes further). NaN or inf makes d NaN."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        src, out = args
        floats, ints = ir.VectorType(F32, 32), ir.VectorType(I32, 32)
        v = b.load(pointer(b, src, floats), align=4)
        magnitude = call_llvm(b, "llvm.fabs.v32f32", floats, [v])
        greatest = call_llvm(b, "llvm.vector.reduce.fmaximum.v32f32", F32, [magnitude])
        usable = b.fcmp_ordered("<", greatest, ir.Constant(F32, float("inf")))
        positive = b.and_(usable, b.fcmp_ordered(">", greatest, ir.Constant(F32, 0.0)))
        scale = b.fmul(greatest, ir.Constant(F32, 1.0 / 127.0))
        inverse = b.select(positive, b.fdiv(ir.Constant(F32, 127.0), greatest), ir.Constant(F32, 0.0))
        # a subnormal maximum overflows the quotient: such a block is as good as zero
        inverse = b.select(b.fcmp_ordered("<", inverse, ir.Constant(F32, float("inf"))), inverse, ir.Constant(F32, 0.0))
        scaled = b.fmul(v, llvm_splat(b, inverse, 32))
        scaled = b.select(llvm_splat(b, usable, 32), scaled, ir.Constant(floats, [0.0] * 32))
        rounded = b.fptosi(call_llvm(b, "llvm.rint.v32f32", floats, [scaled]), ints)
        scale = b.select(usable, scale, ir.Constant(F32, float("nan")))

        def store(value: ir.Value, offset: int) -> None:
            b.store(value, pointer(b, b.add(out, i64(offset)), value.type), align=4)

        bytes_ = b.trunc(rounded, ir.VectorType(I8, 32))
        for j in range(4):
            store(_lanes(b, bytes_, range(8 * j, 8 * j + 8)), 64 * j)
        store(llvm_splat(b, scale, 2), SCALES_AT)
        halves = []
        for first in (0, 16):
            parts = [
                _lanes(b, rounded, [first + 8 * piece + i, first + 8 * piece + 4 + i])
                for piece in (0, 1)
                for i in range(4)
            ]
            while len(parts) > 1:
                parts = [b.add(one, two) for one, two in zip(parts[::2], parts[1::2], strict=True)]
            halves.append(parts[0])
        both = b.add(*halves)
        store(b.neg(both), SUMS_AT)
        store(b.neg(halves[1]), SECOND_SUMS_AT)
        store(b.fmul(b.sitofp(both, ir.VectorType(F32, 2)), llvm_splat(b, scale, 2)), TOTALS_AT)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _lanes(b: ir.IRBuilder, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


@njit
def quantize_row(x, K, out):
    """Quantize K f32 at x into the layout above at out."""
    if K % GROUP != 0:
        last = out + K // GROUP * GROUP_NBYTES
        for i in range(GROUP_NBYTES // 8):
            put_i64(last + 8 * i, 0)
    for block in range(K // SUB_BLOCK):
        _quantize_block(x + 4 * SUB_BLOCK * block, out + block // 8 * GROUP_NBYTES + block % 8 * 8)


@njit
def copy_row(x, n, out):
    k = 0
    while k + LANES <= n:
        store_f32(out + 4 * k, load_f32(x + 4 * k))
        k += LANES
    while k < n:
        put_f32(out + 4 * k, f32_at(x + 4 * k))
        k += 1


@njit
def prepare_rows(team, x, T, K, dtype, scratch):
    """Address of x [T, K] f32 prepared for weights of `dtype`: x itself where rows are aligned floats, else scratch.

    The threads share the rows; a barrier must follow before they are read.
    """
    stride = row_nbytes(K, dtype)
    if dtype < FIRST_BLOCK_DTYPE and stride == 4 * K:
        return x
    t = take(team, 1)
    while t < T:
        if dtype < FIRST_BLOCK_DTYPE:
            copy_row(x + 4 * t * K, K, scratch + t * stride)
        else:
            quantize_row(x + 4 * t * K, K, scratch + t * stride)
        t = take(team, 1)
    return scratch
