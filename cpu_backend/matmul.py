"""matmul: out[t, r] = Σ_k x[t, k] · w[r, k] for a few rows of a stored weight and any number of tokens.

One function per weight dtype, reached through the team's table, so that op kernels know nothing of formats. The tile is
R weight rows × C tokens of accumulators in registers; each output is one chain of vector FMAs over k in order, whatever
R and C are, so a result never depends on the batch a token shares a step with.

Floats: x is f32 [K]. Block formats: x is quantized to bytes first (activations.py), products are integer dots scaled
per block, and weights are only ever unpacked into registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .activations import BLOCK, corr_offset, scale_offset
from .emit import emit_byte_dot, emit_loop, i64, weights_are_unsigned
from .simd import (
    F16,
    F32,
    I8,
    I32,
    LANES,
    llvm_fma,
    llvm_hsum,
    llvm_load_float,
    pointer,
)

TILE_ROWS, TILE_TOKENS = 4, 4
ITEM_NBYTES = {"f32": 4, "f16": 2, "bf16": 2}
BLOCK_NBYTES = {"q8_0": 34, "q4_0": 18}

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


def _load_block_bytes(b: ir.IRBuilder, dtype: str, block: ir.Value) -> ir.Value:
    """The 32 weights of a block as bytes: unsigned (plus the zero point) or signed, as the target's byte dot wants."""
    vec32 = ir.VectorType(I8, 32)
    data = b.add(block, i64(2))
    if dtype == "q8_0":
        raw = b.load(pointer(b, data, vec32), align=1)
        return b.xor(raw, ir.Constant(vec32, [0x80] * 32)) if weights_are_unsigned() else raw
    vec16 = ir.VectorType(I8, 16)
    packed = b.load(pointer(b, data, vec16), align=1)
    low = b.and_(packed, ir.Constant(vec16, [15] * 16))
    high = b.lshr(packed, ir.Constant(vec16, [4] * 16))
    nibbles = b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))
    return nibbles if weights_are_unsigned() else b.sub(nibbles, ir.Constant(vec32, [8] * 32))


def _emit_block_tile(b: ir.IRBuilder, dtype: str, R: int, C: int, args: list[ir.Value]) -> None:
    """Tiles of block formats: G blocks at a time, 8 lanes of partial sums per block.

    With unsigned weights (value + zero point) the integer accumulator starts at −zero_point · Σx per lane, which
    activations.py stores for a zero point of 8.
    """
    w, w_stride, x, x_stride, K, out, out_stride = args
    G = max(LANES // 8, 1)
    nbytes = BLOCK_NBYTES[dtype]
    ints, floats = ir.VectorType(I32, 8 * G), ir.VectorType(F32, 8 * G)
    rows = [b.add(w, b.mul(w_stride, i64(r))) for r in range(R)]
    tokens = [b.add(x, b.mul(x_stride, i64(c))) for c in range(C)]
    corrs = [b.add(t, corr_offset(b, K)) for t in tokens]
    scales = [b.add(t, scale_offset(b, K)) for t in tokens]
    num_blocks = b.sdiv(K, i64(BLOCK))
    spread = ir.Constant(ir.VectorType(I32, 8 * G), [g for g in range(G) for _ in range(8)])
    pair = ir.Constant(ir.VectorType(I32, 32 * G), list(range(32 * G)))
    shift = ir.Constant(ints, [4] * (8 * G))  # 8 · 16 = 128

    def weights(row: ir.Value, first: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(bytes, scales as G f32 lanes) of G blocks; blocks past the row's end repeat the first one at scale 0."""
        data, ds = [], ir.Constant(ir.VectorType(F16, G), ir.Undefined)
        for g in range(G):
            inside = b.icmp_signed("<", b.add(first, i64(g)), num_blocks)
            index = b.select(inside, b.add(first, i64(g)), first) if g else first
            block = b.add(row, b.mul(index, i64(nbytes)))
            data.append(_load_block_bytes(b, dtype, block))
            d = b.load(pointer(b, block, F16), align=2)
            ds = b.insert_element(ds, b.select(inside, d, ir.Constant(F16, 0.0)) if g else d, ir.Constant(I32, g))
        merged = b.shuffle_vector(data[0], data[1], pair) if G == 2 else data[0]
        return merged, b.fpext(ds, ir.VectorType(F32, G))

    def body(i: ir.Value, acc: list[ir.Value]) -> list[ir.Value]:
        first = b.mul(i, i64(G))
        x_at, corr_at, d_at = (b.mul(first, i64(n)) for n in (BLOCK, 32, 4))
        xs = [b.load(pointer(b, b.add(t, x_at), ir.VectorType(I8, 32 * G)), align=4) for t in tokens]
        dx = [b.load(pointer(b, b.add(s, d_at), ir.VectorType(F32, G)), align=4) for s in scales]
        start = [ir.Constant(ints, [0] * (8 * G))] * C
        if weights_are_unsigned():
            start = [b.load(pointer(b, b.add(t, corr_at), ints), align=4) for t in corrs]
            if dtype == "q8_0":
                start = [b.shl(s, shift) for s in start]
        new = []
        for r in range(R):
            wv, dw = weights(rows[r], first)
            for c in range(C):
                dot = b.sitofp(emit_byte_dot(b, start[c], wv, xs[c]), floats)
                scale = b.fmul(dw, dx[c])
                scale = b.shuffle_vector(scale, scale, spread)
                new.append(llvm_fma(b, dot, scale, acc[r * C + c]))
        return new

    groups = b.sdiv(b.add(num_blocks, i64(G - 1)), i64(G))
    acc = emit_loop(b, groups, [_zeros(floats)] * (R * C), body)
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
    wide, tall, narrow, single = _tile(dtype, R, C), _tile(dtype, 2 * R, 1), _tile(dtype, 1, C), _tile(dtype, 1, 1)

    @njit
    def few_tokens(w, w_stride, rows, x, x_stride, K, out, out_stride):
        r = 0
        while r + 2 * R <= rows:
            tall(w + r * w_stride, w_stride, x, x_stride, K, out + 4 * r, out_stride)
            r += 2 * R
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
