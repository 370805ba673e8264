"""Activations as matmul wants them: f32 rows, or rows quantized to bytes for block-quantized weights.

A quantized row of K values (K a multiple of 32, padded to an even number Kp / 32 of blocks) lies as
    bytes  i8  [Kp]      q = round(x / d), d = max|x| / 127 per block of 32
    corr   i32 [Kp / 4]  −8 · Σ of 4 neighbouring q: what an unsigned weight's zero point of 8 adds, taken back
    scale  f32 [Kp / 4]  d, once for each 4 neighbouring q
With 64-byte vectors two blocks interleave by halves (first halves of both, then second halves), so that a vector of
packed 4-bit weights unpacks with one shift. The padding block has q = 0 and d = 0.
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
    store_f32,
)
from .sync import take

BLOCK = 32
GROUPED = LANES == 16  # two blocks to a vector
HALF_STRIDE = 32 if GROUPED else 16  # bytes from the first half of a block to its second
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
    return 3 * Kp


@intrinsic
def _quantize_block(typingctx: Any, x: Any, q: Any, corr: Any, scale: Any) -> Any:
    """Quantize 32 f32 at x; q, corr and scale are addresses of the block's first half. NaN or inf makes d NaN."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        src, q_at, corr_at, scale_at = args
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
        for half in (0, 1):
            part = _lanes(b, rounded, [16 * half + lane for lane in range(16)])
            bytes_ = b.trunc(part, ir.VectorType(I8, 16))
            b.store(bytes_, pointer(b, b.add(q_at, i64(HALF_STRIDE * half)), bytes_.type), align=4)
            fours = [_lanes(b, part, [4 * lane + j for lane in range(4)]) for j in range(4)]
            sums = b.add(b.add(fours[0], fours[1]), b.add(fours[2], fours[3]))
            sums = b.mul(sums, ir.Constant(sums.type, [-8] * 4))
            b.store(sums, pointer(b, b.add(corr_at, i64(HALF_STRIDE * half)), sums.type), align=4)
            ds = llvm_splat(b, scale, 4)
            b.store(ds, pointer(b, b.add(scale_at, i64(HALF_STRIDE * half)), ds.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _lanes(b: ir.IRBuilder, vector: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


@njit
def _half_offset(block):
    """Byte offset of a block's first half in each of the three arrays (4 values of 4 bytes, or 16 bytes, a half)."""
    if GROUPED:
        return block // 2 * 2 * BLOCK + block % 2 * 16
    return block * BLOCK


@njit
def quantize_row(x, K, out):
    """Quantize K f32 at x into the layout above at out."""
    Kp = (K + 63) // 64 * 64
    corr, scale = out + Kp, out + 2 * Kp
    for block in range(K // BLOCK):
        at = _half_offset(block)
        _quantize_block(x + 4 * BLOCK * block, out + at, corr + at, scale + at)
    if Kp > K:
        for half in range(2):
            at = _half_offset(K // BLOCK) + HALF_STRIDE * half
            for array in range(3):
                for i in range(4):
                    put_i32(out + array * Kp + at + 4 * i, 0)


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
