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

from .activations import GROUP_NBYTES, SCALES_AT, SECOND_SUMS_AT, SUMS_AT, TOTALS_AT
from .blocks import GROUP, BlockFormat, block_format
from .emit import emit_byte_dot, emit_loop, i64, prefetch
from .simd import (
    F32,
    I8,
    I32,
    LANES,
    llvm_fma,
    llvm_hsum,
    llvm_load_float,
    pointer,
)
from .unpack import Group, load_group, part

# Tiles of one row read a matrix from its first byte to its last: one stream, which every hardware prefetcher follows.
# Those that compute as well help it along. Taller ones jump from row to row, so they must ask for what they will need.
AHEAD_NBYTES = 2048
AHEAD_BLOCK_ROWS = 8
FEW = 8  # tokens of a tile that still waits for memory
ITEM_NBYTES = {"f32": 4, "f16": 2, "bf16": 2}


def _zeros(vector: ir.VectorType) -> ir.Constant:
    return ir.Constant(vector, [0.0] * vector.count)


def _emit_float_tile(b: ir.IRBuilder, dtype: str, R: int, C: int, args: list[ir.Value]) -> None:
    (w, w_stride, num_rows), (x, x_stride, num_tokens), K, _, out, out_stride = args[:3], args[3:6], *args[6:]
    rows = [b.add(w, b.mul(w_stride, _at_most(b, r, num_rows))) for r in range(R)]
    tokens = [b.add(x, b.mul(x_stride, _at_most(b, c, num_tokens))) for c in range(C)]
    size = ITEM_NBYTES[dtype]
    ahead = i64(AHEAD_NBYTES) if R == 1 else b.mul(w_stride, i64(2 * R))
    num_vectors = b.sdiv(K, i64(LANES))

    def body(i: ir.Value, acc: list[ir.Value]) -> list[ir.Value]:
        w_at, x_at = b.mul(i, i64(LANES * size)), b.mul(i, i64(LANES * 4))
        ws = [llvm_load_float(b, dtype, b.add(row, w_at), LANES) for row in rows]
        if C > 1:
            for row in rows:
                prefetch(b, b.add(row, b.add(ahead, w_at)))
        new = list(acc)
        for c in range(C):
            xv = llvm_load_float(b, "f32", b.add(tokens[c], x_at), LANES)
            for r in range(R):
                new[r * C + c] = llvm_fma(b, ws[r], xv, acc[r * C + c])
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
    _store_tile(b, sums, R, C, num_rows, num_tokens, out, out_stride)


def _store_tile(
    b: ir.IRBuilder,
    sums: list[ir.Value],
    R: int,
    C: int,
    rows: ir.Value,
    tokens: ir.Value,
    out: ir.Value,
    out_stride: ir.Value,
) -> None:
    for c in range(C):
        row = b.add(out, b.mul(out_stride, _at_most(b, c, tokens)))
        for r in range(R):
            at = b.add(row, b.mul(_at_most(b, r, rows), i64(4)))
            b.store(sums[r * C + c], pointer(b, at, F32), align=4)


def _emit_block_tile(b: ir.IRBuilder, dtype: str, R: int, C: int, args: list[ir.Value]) -> None:
    """Tiles of block formats: groups of 256 weights, the last one perhaps incomplete.

    Its missing blocks are multiplied with zeros, so they may be the row below, but never what lies behind the matrix.
    """
    (w, w_stride, rows), (x, x_stride, tokens), K, end, out, out_stride = args[:3], args[3:6], *args[6:]
    format = block_format(dtype)
    assert format is not None
    row_at = [b.add(w, b.mul(w_stride, _at_most(b, r, rows))) for r in range(R)]
    ahead = i64(AHEAD_NBYTES) if R == 1 else b.mul(w_stride, i64(AHEAD_BLOCK_ROWS))
    token_at = [b.add(x, b.mul(x_stride, _at_most(b, c, tokens))) for c in range(C)]
    groups = b.sdiv(K, i64(GROUP))
    floats = ir.VectorType(F32, LANES)

    def step(i: ir.Value, acc: list[ir.Value], starts: list[ir.Value], x_starts: list[ir.Value]) -> list[ir.Value]:
        w_at, x_at = b.mul(i, i64(format.group_nbytes)), b.mul(i, i64(GROUP_NBYTES))
        new = list(acc)
        xs = [_Activations(b, format, b.add(t, x_at)) for t in x_starts] if C == 1 else []
        for first in range(0, R, 2 if C > 1 else 1):
            pair = range(first, min(first + (2 if C > 1 else 1), R))
            loaded = []
            for r in pair:
                address = b.add(starts[r], w_at)
                if 1 < C <= FEW:
                    for line in range(0, format.group_nbytes, 64):
                        prefetch(b, b.add(address, b.add(ahead, i64(line))))
                loaded.append(load_group(b, format, address))
            for c in range(C):
                at = xs[c] if xs else _Activations(b, format, b.add(x_starts[c], x_at))
                for r, group in zip(pair, loaded, strict=True):
                    new[r * C + c] = _emit_group_dot(b, format, group, at, new[r * C + c])
        return new

    acc = emit_loop(b, groups, [_zeros(floats)] * (R * C), lambda i, acc: step(i, acc, row_at, token_at))
    if format.block_size < GROUP:
        rest = b.and_(K, i64(GROUP - 1))
        tails = _emit_tails(b, format, row_at, groups, rest, end)
        x_at = b.mul(groups, i64(GROUP_NBYTES))
        x_tails = [b.add(t, x_at) for t in token_at]
        some = b.zext(b.icmp_signed(">", rest, i64(0)), i64(0).type)
        acc = emit_loop(b, some, acc, lambda i, acc: step(i, acc, tails(), x_tails))
    _store_tile(b, [llvm_hsum(b, a) for a in acc], R, C, rows, tokens, out, out_stride)


def _at_most(b: ir.IRBuilder, index: int, count: ir.Value) -> ir.Value:
    """index, or the last of `count`: a tile beyond the edge computes its last row or token again."""
    if index == 0:
        return i64(0)
    return b.select(b.icmp_signed("<", i64(index), count), i64(index), b.sub(count, i64(1)))


def _emit_tails(
    b: ir.IRBuilder, format: BlockFormat, rows: list[ir.Value], groups: ir.Value, rest: ir.Value, end: ir.Value
) -> Callable[[], list[ir.Value]]:
    """Addresses of the rows' incomplete last groups; those too near to the matrix's end are copied and padded."""
    nbytes = format.group_nbytes
    room = (nbytes + 63) // 64 * 64
    with b.goto_entry_block():
        copies = b.alloca(ir.ArrayType(ir.IntType(8), room * len(rows)))
        copies.align = 64
    base = b.ptrtoint(copies, end.type)
    starts = [b.add(row, b.mul(groups, i64(nbytes))) for row in rows]
    highest = starts[0]
    for start in starts[1:]:
        highest = b.select(b.icmp_signed(">", start, highest), start, highest)
    unsafe = b.and_(b.icmp_signed(">", b.add(highest, i64(nbytes)), end), b.icmp_signed(">", rest, i64(0)))
    there = b.mul(b.sdiv(rest, i64(format.block_size)), i64(format.block_nbytes))
    half = ir.IntType(16)
    with b.if_then(unsafe, likely=False):
        for r, start in enumerate(starts):

            def copy(i: ir.Value, _: list[ir.Value], start: ir.Value = start, r: int = r) -> list[ir.Value]:
                at = b.mul(i, i64(2))
                known = b.icmp_signed("<", at, there)
                source = b.select(known, b.add(start, at), start)
                value = b.select(known, b.load(pointer(b, source, half), align=1), ir.Constant(half, 0))
                b.store(value, pointer(b, b.add(base, b.add(at, i64(room * r))), half), align=2)
                return []

            emit_loop(b, i64(nbytes // 2), [], copy)
    return lambda: [b.select(unsafe, b.add(base, i64(room * r)), start) for r, start in enumerate(starts)]


class _Activations:
    """A group of one token's activations, loaded when asked for."""

    def __init__(self, b: ir.IRBuilder, format: BlockFormat, address: ir.Value) -> None:
        self.b, self.address = b, address
        self.parts = range(16 // LANES)

    def bytes(self, j: int, p: int) -> ir.Value:
        """Piece j, the p-th run of lanes."""
        return self._load(64 * j + 4 * LANES * p, ir.VectorType(I8, 4 * LANES))

    def scale(self, p: int) -> ir.Value:
        return self._load(SCALES_AT + 4 * LANES * p, ir.VectorType(F32, LANES))

    def sums(self, pieces: tuple[int, ...], p: int) -> ir.Value:
        """−Σ of the bytes of these pieces: all, the first two or the second two."""
        second = self._load(SECOND_SUMS_AT + 4 * LANES * p, ir.VectorType(I32, LANES))
        if pieces == (2, 3):
            return second
        found = self._load(SUMS_AT + 4 * LANES * p, ir.VectorType(I32, LANES))
        return found if len(pieces) == 4 else self.b.sub(found, second)

    def totals(self, pieces: tuple[int, ...], p: int) -> ir.Value:
        """Σ of the values themselves."""
        if len(pieces) == 4:
            return self._load(TOTALS_AT + 4 * LANES * p, ir.VectorType(F32, LANES))
        sums = self.b.sitofp(self.sums(pieces, p), ir.VectorType(F32, LANES))
        return self.b.fmul(sums, self.b.fneg(self.scale(p)))

    def _load(self, offset: int, kind: ir.VectorType) -> ir.Value:
        return self.b.load(pointer(self.b, self.b.add(self.address, i64(offset)), kind), align=4)


def _emit_group_dot(b: ir.IRBuilder, format: BlockFormat, group: Group, x: _Activations, acc: ir.Value) -> ir.Value:
    """acc + Σ over a group; acc has LANES lanes."""
    floats, ints = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
    runs = [(0, 1, 2, 3)] if len(group.scales) == 1 else [(0, 1), (2, 3)]
    for p in x.parts:
        found: ir.Value | None = None
        for n, pieces in enumerate(runs):
            start: ir.Value = ir.Constant(ints, [0] * LANES)
            if group.zero_point:
                start = b.mul(x.sums(pieces, p), ir.Constant(ints, [group.zero_point] * LANES))
            ws = [part(b, group.bytes[j], p, 4 * LANES) for j in pieces]
            dot = emit_byte_dot(b, start, ws, [x.bytes(j, p) for j in pieces], group.unsigned, format.greatest)
            dot, scale = b.sitofp(dot, floats), part(b, group.scales[n], p, LANES)
            if len(runs) == 1:
                acc = llvm_fma(b, dot, b.fmul(scale, x.scale(p)), acc)
            else:
                found = b.fmul(dot, scale) if found is None else llvm_fma(b, dot, scale, found)
            if group.offsets:
                acc = llvm_fma(b, part(b, group.offsets[n], p, LANES), x.totals(pieces, p), acc)
        if found is not None:
            acc = llvm_fma(b, found, x.scale(p), acc)
    return acc


def _tile(dtype: str, R: int, C: int) -> Any:
    """tile(w, w_stride, rows, x, x_stride, tokens, K, end, out, out_stride): up to R rows and C tokens.

    Strides in bytes; out[c * out_stride + 4 r]; `end` is where the matrix's memory ends.
    """
    emit = _emit_float_tile if dtype in ITEM_NBYTES else _emit_block_tile

    @intrinsic
    def tile(
        typingctx: Any,
        w: Any,
        w_stride: Any,
        rows: Any,
        x: Any,
        x_stride: Any,
        tokens: Any,
        K: Any,
        end: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            emit(b, dtype, R, C, list(args))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    @njit
    def sweep(w, w_stride, rows, x, x_stride, tokens, K, end, out, out_stride):
        r = 0
        while r < rows:
            tile(w + r * w_stride, w_stride, rows - r, x, x_stride, tokens, K, end, out + 4 * r, out_stride)
            r += R

    return sweep


def tile_rows(dtype: str) -> dict[int, int]:
    """Rows of a tile by its tokens: one where memory binds, else as many accumulators as registers hold."""
    if LANES == 16:
        return {1: 1, 2: 1, 4: 1, 8: 3 if dtype in ITEM_NBYTES else 2}
    return {1: 1, 2: 1, 4: 4 if LANES == 4 else 2}


def make(dtype: str) -> tuple[Callable, tuple]:
    """matmul(w, w_stride, rows, x, x_stride, tokens, K, out, out_stride); strides in bytes, out f32."""
    sweeps = {C: _tile(dtype, R, C) for C, R in tile_rows(dtype).items()}
    C = max(sweeps)
    single, pair, four, wide = sweeps[1], sweeps[2], sweeps[4], sweeps[C]

    def matmul(w, w_stride, rows, x, x_stride, tokens, K, out, out_stride):
        end = w + rows * w_stride
        t = 0
        while t < tokens:
            left = tokens - t
            xt, ot = x + t * x_stride, out + t * out_stride
            if left > 4:
                wide(w, w_stride, rows, xt, x_stride, left, K, end, ot, out_stride)
                t += C
            elif left > 2:
                four(w, w_stride, rows, xt, x_stride, left, K, end, ot, out_stride)
                t += 4
            elif left == 2:
                pair(w, w_stride, rows, xt, x_stride, left, K, end, ot, out_stride)
                t += 2
            else:
                single(w, w_stride, rows, xt, x_stride, left, K, end, ot, out_stride)
                t += 1

    return matmul, (types.int64,) * 9
