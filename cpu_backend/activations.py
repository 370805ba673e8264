"""Activations as matmul wants them: f32 rows, or rows quantized to bytes for block-quantized weights.

A quantized row of K values (K a multiple of 32, padded to an even number of blocks) lies as
    bytes  i8  [Kp]       q = round(x / d), d = max|x| / 127 per block of 32
    corr   i32 [Kp / 4]   −8 · Σ of 4 neighbouring q: what an unsigned weight's zero point of 8 adds, taken back
    scale  f32 [Kp / 32]  d
The last, padding block has q = 0 and d = 0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

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
    put_i32,
    put_u8,
    store_f32,
)
from .sync import take

BLOCK = 32
FIRST_BLOCK_DTYPE = 8  # dtype codes from here on are block formats (gllm_driver/types.py)


def padded(b: ir.IRBuilder, K: ir.Value) -> ir.Value:
    """K rounded up to two blocks."""
    return b.and_(b.add(K, i64(2 * BLOCK - 1)), i64(-2 * BLOCK))


def corr_offset(b: ir.IRBuilder, K: ir.Value) -> ir.Value:
    return padded(b, K)


def scale_offset(b: ir.IRBuilder, K: ir.Value) -> ir.Value:
    return b.mul(padded(b, K), i64(2))


@njit
def row_nbytes(K, dtype):
    """Bytes of one prepared row of K activations for a weight of this dtype code, a multiple of 64."""
    if dtype < FIRST_BLOCK_DTYPE:
        return (K * 4 + 63) // 64 * 64
    Kp = (K + 63) // 64 * 64
    return (2 * Kp + Kp // 8 + 63) // 64 * 64


@intrinsic
def _quantize_block(typingctx: Any, x: Any, q: Any, corr: Any, scale: Any) -> Any:
    """Quantize 32 f32 at x: bytes to q, lane sums to corr, the scale to scale. NaN or inf in x makes the scale NaN."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        src, q_at, corr_at, scale_at = args
        floats, ints, bytes_ = ir.VectorType(F32, 32), ir.VectorType(I32, 32), ir.VectorType(I8, 32)
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
        b.store(b.trunc(rounded, bytes_), pointer(b, q_at, bytes_), align=4)
        sums = None
        for j in range(4):
            part = b.shuffle_vector(
                rounded, rounded, ir.Constant(ir.VectorType(I32, 8), [4 * lane + j for lane in range(8)])
            )
            sums = part if sums is None else b.add(sums, part)
        lanes = ir.VectorType(I32, 8)
        b.store(b.mul(sums, ir.Constant(lanes, [-8] * 8)), pointer(b, corr_at, lanes), align=4)
        nan = ir.Constant(F32, float("nan"))
        b.store(b.select(usable, scale, nan), pointer(b, scale_at, F32), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit
def quantize_row(x, K, out):
    """Quantize K f32 at x into the layout above at out."""
    Kp = (K + 63) // 64 * 64
    corr, scale = out + Kp, out + 2 * Kp
    for block in range(K // BLOCK):
        _quantize_block(x + 128 * block, out + BLOCK * block, corr + BLOCK * block, scale + 4 * block)
    if Kp > K:
        for i in range(BLOCK):
            put_u8(out + K + i, 0)
        for i in range(8):
            put_i32(corr + K + 4 * i, 0)
        put_f32(scale + 4 * (K // BLOCK), types.float32(0.0))


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
