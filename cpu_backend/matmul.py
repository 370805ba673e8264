"""matmul: out[t, r] = Σ_k x[t, k] · w[r, k] for a few rows of a stored weight and any number of tokens.

One function per weight dtype, reached through the team's table, so that op kernels know nothing of formats. The tile is
R weight rows × C tokens of accumulators in registers; each output is one chain of vector FMAs over k in order, whatever
R and C are, so a result never depends on the batch a token shares a step with.

Floats: x is f32 [K]. Block formats: x is quantized to bytes first (activations.py), products are integer dots scaled
per block, and weights are only ever unpacked into registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .activations import BLOCK, corr_offset, scale_offset
from .emit import emit_byte_dot, emit_loop, i64, prefetch, weights_are_unsigned
from .simd import (
    F16,
    F32,
    I8,
    I16,
    I32,
    LANES,
    llvm_fma,
    llvm_hsum,
    llvm_load_float,
    llvm_splat,
    pointer,
)

TILE_ROWS, TILE_TOKENS = 4, 4
# Rows read side by side for a single token: the hardware prefetcher follows four long rows by itself, but not eight;
# short rows of blocks want eight, and their next tile prefetched by hand.
TALL_FLOAT_ROWS, TALL_BLOCK_ROWS = 4, 8
ITEM_NBYTES = {"f32": 4, "f16": 2, "bf16": 2}
GROUP = max(LANES // 8, 1)  # blocks whose bytes fill a vector

Codegen = Callable[..., None]


def _zeros(vector: ir.VectorType) -> ir.Constant:
    return ir.Constant(vector, [0.0] * vector.count)


def _emit_float_tile(b: ir.IRBuilder, dtype: str, R: int, C: int, args: list[ir.Value]) -> None:
    w, w_stride, x, x_stride, K, out, out_stride = args
    rows = [b.add(w, b.mul(w_stride, i64(r))) for r in range(R)]
    tokens = [b.add(x, b.mul(x_stride, i64(c))) for c in range(C)]
    size = ITEM_NBYTES[dtype]
    num_vectors = b.sdiv(K, i64(LANES))

    def body(i: ir.Value, acc: list[ir.Value]) -> list[ir.Value]:
        w_at, x_at = b.mul(i, i64(LANES * size)), b.mul(i, i64(LANES * 4))
        xs = [llvm_load_float(b, "f32", b.add(t, x_at), LANES) for t in tokens]
        new = []
        for r in range(R):
            wv = llvm_load_float(b, dtype, b.add(rows[r], w_at), LANES)
            new += [llvm_fma(b, wv, xs[c], acc[r * C + c]) for c in range(C)]
        return new

    acc = emit_loop(b, num_vectors, [_zeros(ir.VectorType(F32, LANES))] * (R * C), body)
    done = b.mul(num_vectors, i64(LANES))

    def tail(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        k = b.add(done, i)
        xs = [b.load(pointer(b, b.add(t, b.mul(k, i64(4))), F32), align=4) for t in tokens]
        new = []
        for r in range(R):
            one = llvm_load_float(b, dtype, b.add(rows[r], b.mul(k, i64(size))), 1)
            wv = b.extract_element(one, ir.Constant(I32, 0))
            new += [llvm_fma(b, wv, xs[c], sums[r * C + c]) for c in range(C)]
        return new

    sums = emit_loop(b, b.sub(K, done), [llvm_hsum(b, a) for a in acc], tail)
    _store_tile(b, sums, R, C, out, out_stride)


def _store_tile(b: ir.IRBuilder, sums: list[ir.Value], R: int, C: int, out: ir.Value, out_stride: ir.Value) -> None:
    for r in range(R):
        for c in range(C):
            at = b.add(out, b.add(b.mul(out_stride, i64(c)), i64(4 * r)))
            b.store(sums[r * C + c], pointer(b, at, F32), align=4)


@dataclass(frozen=True)
class BlockFormat:
    """How a group of G consecutive blocks of a row (G = 2 with 64-byte vectors, else 1) becomes bytes and scales.

    Bytes come in the order activations.py stores its own: the first halves of the blocks, then the second halves.
    """

    nbytes: int
    load_bytes: Callable[[ir.IRBuilder, ir.Value, int], ir.Value]  # (b, address of the first block, blocks there are)
    zero_point: int


def _quarter(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.load(pointer(b, address, ir.VectorType(I8, 16)), align=1)


def _join(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Concatenate equal vectors (a power of two of them)."""
    while len(parts) > 1:
        lanes = ir.Constant(ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [b.shuffle_vector(x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _q8_0_bytes(b: ir.IRBuilder, block: ir.Value, blocks: int) -> ir.Value:
    halves = [
        _quarter(b, b.add(block, i64(34 * g + 2 + 16 * half))) if g < blocks else _zero_bytes(16)
        for half in (0, 1)
        for g in range(GROUP)
    ]
    raw = _join(b, halves)
    if not weights_are_unsigned():
        return raw
    return b.xor(raw, ir.Constant(raw.type, [0x80] * raw.type.count))


def _q4_0_bytes(b: ir.IRBuilder, block: ir.Value, blocks: int) -> ir.Value:
    packed = _join(
        b, [_quarter(b, b.add(block, i64(18 * g + 2))) if g < blocks else _zero_bytes(16) for g in range(GROUP)]
    )
    words = ir.VectorType(I16, 16 * GROUP)
    both = b.bitcast(_join(b, [packed, packed]), words)
    shifted = b.lshr(both, ir.Constant(words, [0] * (8 * GROUP) + [4] * (8 * GROUP)))
    nibbles = b.bitcast(shifted, ir.VectorType(I8, 32 * GROUP))
    nibbles = b.and_(nibbles, ir.Constant(nibbles.type, [15] * nibbles.type.count))
    if weights_are_unsigned():
        return nibbles
    return b.sub(nibbles, ir.Constant(nibbles.type, [8] * nibbles.type.count))


def _zero_bytes(count: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I8, count), [0] * count)


BLOCK_FORMATS = {
    "q8_0": BlockFormat(34, _q8_0_bytes, 128),
    "q4_0": BlockFormat(18, _q4_0_bytes, 8),
}


def _load_scales(b: ir.IRBuilder, format: BlockFormat, block: ir.Value, blocks: int) -> ir.Value:
    """The f16 scales at the head of a group's blocks, as f32 in the lanes their dot products end in."""
    lanes = 8 * GROUP
    if blocks == 2:
        # both scales lie within one vector load of the group: no lane is inserted by hand
        wide = ir.VectorType(F16, 16 if format.nbytes < 32 else 32)
        halves = b.load(pointer(b, block, wide), align=2)
        pick = ir.Constant(
            ir.VectorType(I32, lanes), [0 if lane % 8 < 4 else format.nbytes // 2 for lane in range(lanes)]
        )
        return b.fpext(b.shuffle_vector(halves, halves, pick), ir.VectorType(F32, lanes))
    d = b.fpext(b.load(pointer(b, block, F16), align=2), F32)
    if GROUP == 1:
        return llvm_splat(b, d, lanes)
    own = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [lane % 8 < 4 for lane in range(lanes)])
    return b.select(own, llvm_splat(b, d, lanes), _zeros(ir.VectorType(F32, lanes)))


def _emit_block_tile(b: ir.IRBuilder, dtype: str, R: int, C: int, args: list[ir.Value]) -> None:
    """Tiles of block formats. With unsigned weights (value + zero point) the integer accumulator starts at
    −zero_point · Σx per lane, which activations.py stores for a zero point of 8."""
    w, w_stride, x, x_stride, K, out, out_stride = args
    format = BLOCK_FORMATS[dtype]
    lanes = 8 * GROUP
    ints, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    rows = [b.add(w, b.mul(w_stride, i64(r))) for r in range(R)]
    ahead = b.mul(w_stride, i64(R))
    tokens = [b.add(x, b.mul(x_stride, i64(c))) for c in range(C)]
    corrs = [b.add(t, corr_offset(b, K)) for t in tokens]
    scales = [b.add(t, scale_offset(b, K)) for t in tokens]
    num_blocks = b.sdiv(K, i64(BLOCK))
    groups = b.sdiv(num_blocks, i64(GROUP))

    def step(i: ir.Value, acc: list[ir.Value], blocks: int) -> list[ir.Value]:
        w_at, x_at, wide_at = (b.mul(i, i64(n * GROUP)) for n in (format.nbytes, BLOCK, BLOCK))
        xs = [b.load(pointer(b, b.add(t, x_at), ir.VectorType(I8, 32 * GROUP)), align=4) for t in tokens]
        dx = [b.load(pointer(b, b.add(s, wide_at), floats), align=4) for s in scales]
        start: list[ir.Value] = [ir.Constant(ints, [0] * lanes)] * C
        if weights_are_unsigned():
            start = [b.load(pointer(b, b.add(t, wide_at), ints), align=4) for t in corrs]
            if format.zero_point == 128:
                start = [b.shl(s, ir.Constant(ints, [4] * lanes)) for s in start]
        new = []
        for r in range(R):
            block = b.add(rows[r], w_at)
            if C == 1:
                prefetch(b, b.add(block, ahead))  # the tile below: its rows are too short for the hardware to guess
            bytes_, dw = format.load_bytes(b, block, blocks), _load_scales(b, format, block, blocks)
            for c in range(C):
                dot = b.sitofp(emit_byte_dot(b, start[c], bytes_, xs[c]), floats)
                new.append(llvm_fma(b, dot, b.fmul(dw, dx[c]), acc[r * C + c]))
        return new

    acc = emit_loop(b, groups, [_zeros(floats)] * (R * C), lambda i, acc: step(i, acc, GROUP))
    if GROUP == 2:
        odd = b.and_(num_blocks, i64(1))
        acc = emit_loop(b, odd, acc, lambda i, acc: step(groups, acc, 1))
    _store_tile(b, [llvm_hsum(b, a) for a in acc], R, C, out, out_stride)


def _tile(dtype: str, R: int, C: int) -> Any:
    """tile(w, w_stride, x, x_stride, K, out, out_stride): strides in bytes; out[c * out_stride + 4 r]."""
    emit = _emit_float_tile if dtype in ITEM_NBYTES else _emit_block_tile

    @intrinsic
    def tile(typingctx: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, K: Any, out: Any, out_stride: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            emit(b, dtype, R, C, list(args))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def make(dtype: str) -> tuple[Callable, tuple]:
    """matmul(w, w_stride, rows, x, x_stride, tokens, K, out, out_stride); strides in bytes, out f32."""
    R, C = TILE_ROWS, TILE_TOKENS
    S = TALL_FLOAT_ROWS if dtype in ITEM_NBYTES else TALL_BLOCK_ROWS
    wide, tall, narrow, single = _tile(dtype, R, C), _tile(dtype, S, 1), _tile(dtype, 1, C), _tile(dtype, 1, 1)

    @njit
    def few_tokens(w, w_stride, rows, x, x_stride, K, out, out_stride):
        r = 0
        while r + S <= rows:
            tall(w + r * w_stride, w_stride, x, x_stride, K, out + 4 * r, out_stride)
            r += S
        while r < rows:
            single(w + r * w_stride, w_stride, x, x_stride, K, out + 4 * r, out_stride)
            r += 1

    def matmul(w, w_stride, rows, x, x_stride, tokens, K, out, out_stride):
        t = 0
        while t + C <= tokens:
            xt, ot = x + t * x_stride, out + t * out_stride
            r = 0
            while r + R <= rows:
                wide(w + r * w_stride, w_stride, xt, x_stride, K, ot + 4 * r, out_stride)
                r += R
            while r < rows:
                narrow(w + r * w_stride, w_stride, xt, x_stride, K, ot + 4 * r, out_stride)
                r += 1
            t += C
        while t < tokens:
            few_tokens(w, w_stride, rows, x + t * x_stride, x_stride, K, out + t * out_stride, out_stride)
            t += 1

    return matmul, (types.int64,) * 9
