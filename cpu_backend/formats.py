"""Per-dtype functions behind the team's tables: dequantize a row, and weigh values (the P·V half of attention).

Adding a block format means a row in blocks.py, adding a float format its decode here; no op kernel changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from gllm_driver.types import FLOAT_DTYPES

from .activations import copy_row
from .blocks import GROUP, PIECES, SUB_BLOCK, BlockFormat, block_format
from .emit import emit_loop, i64
from .matmul import ITEM_NBYTES
from .simd import (
    F32,
    I32,
    LANES,
    bf16_at,
    f16_at,
    f32_at,
    llvm_fma,
    llvm_load_float,
    llvm_splat,
    load_bf16,
    load_f16,
    load_f32,
    pointer,
    put_bf16,
    put_f16,
    put_f32,
    put_u8,
    store_bf16,
    store_f16,
    store_f32,
    u8_at,
)
from .unpack import lane_mask, load_group, part

STORE = {"f32": (store_f32, put_f32), "f16": (store_f16, put_f16), "bf16": (store_bf16, put_bf16)}
LOAD = {"f32": (load_f32, f32_at), "f16": (load_f16, f16_at), "bf16": (load_bf16, bf16_at)}


def make_dequantize(dtype: str) -> tuple[Callable, tuple]:
    """dequantize(row, K, out): K elements of a stored row to f32."""
    if dtype in ITEM_NBYTES:
        load, one = LOAD[dtype]
        size = ITEM_NBYTES[dtype]

        def dequantize_float(row, K, out):
            k = 0
            while k + LANES <= K:
                store_f32(out + 4 * k, load(row + size * k))
                k += LANES
            while k < K:
                put_f32(out + 4 * k, one(row + size * k))
                k += 1

        return dequantize_float, (types.int64,) * 3
    format = block_format(dtype)
    assert format is not None
    nbytes, block_size, block_nbytes = format.group_nbytes, format.block_size, format.block_nbytes
    group, group_memory, value_memory = _dequantize_group(format), _stack_bytes(nbytes), _stack_bytes(4 * GROUP)

    def dequantize_blocks(row, K, out):
        for _group in range(K // GROUP):
            group(row, out)
            row += nbytes
            out += 4 * GROUP
        rest = K % GROUP
        if rest != 0:  # no whole group is there to be read or written
            padded, values = group_memory(), value_memory()
            there = rest // block_size * block_nbytes
            for i in range(nbytes):
                put_u8(padded + i, u8_at(row + i) if i < there else 0)
            group(padded, values)
            copy_row(values, rest, out)

    return dequantize_blocks, (types.int64,) * 3


def _dequantize_group(format: BlockFormat) -> Any:
    """group(address, out): 256 weights to f32."""

    @intrinsic
    def group(typingctx: Any, address: Any, out: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            loaded = load_group(b, format, args[0], for_dots=False)
            ints, floats = ir.VectorType(I32, 8), ir.VectorType(F32, 8)
            zero = ir.Constant(ints, [loaded.zero_point] * 8)
            extend = b.zext if loaded.unsigned else b.sext
            for s, j in PIECES:
                q = b.sub(extend(part(b, loaded.bytes[j], s, 8), ints), zero)
                n = j // 2 if len(loaded.scales) == 2 else 0
                lanes = lane_mask([2 * s] * 8)
                x = b.sitofp(q, floats)
                d = b.shuffle_vector(loaded.scales[n], loaded.scales[n], lanes)
                if loaded.offsets:
                    x = llvm_fma(b, x, d, b.shuffle_vector(loaded.offsets[n], loaded.offsets[n], lanes))
                else:
                    x = b.fmul(x, d)
                b.store(x, pointer(b, b.add(args[1], i64(4 * (SUB_BLOCK * s + 8 * j))), floats), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return group


def _stack_bytes(count: int) -> Any:
    """memory(): the address of `count` bytes in the caller's frame."""

    @intrinsic
    def memory(typingctx: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            with b.goto_entry_block():
                found = b.alloca(ir.ArrayType(ir.IntType(8), count))
                found.align = 64
            return b.ptrtoint(found, ir.IntType(64))

        return types.int64(), codegen

    return memory


def _weigh_tile(dtype: str, C: int, vectors: int, lanes: int) -> Any:
    """o[c, d] += Σ_j p[c, j] · v[j, d] for C rows and vectors × lanes columns, j in order."""
    size = ITEM_NBYTES[dtype]

    @intrinsic
    def tile(typingctx: Any, p: Any, p_stride: Any, v: Any, v_stride: Any, n: Any, o: Any, o_stride: Any) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            p, p_stride, v, v_stride, n, o, o_stride = args
            at = [
                b.add(b.add(o, b.mul(o_stride, i64(c))), i64(4 * lanes * d)) for c in range(C) for d in range(vectors)
            ]

            def body(j: ir.Value, acc: list[ir.Value]) -> list[ir.Value]:
                row = b.add(v, b.mul(j, v_stride))
                vs = [llvm_load_float(b, dtype, b.add(row, i64(size * lanes * d)), lanes) for d in range(vectors)]
                new = []
                for c in range(C):
                    weight = b.load(
                        pointer(b, b.add(b.add(p, b.mul(p_stride, i64(c))), b.mul(j, i64(4))), F32), align=4
                    )
                    weight = llvm_splat(b, weight, lanes)
                    new += [llvm_fma(b, weight, vs[d], acc[c * vectors + d]) for d in range(vectors)]
                return new

            acc = emit_loop(b, n, [llvm_load_float(b, "f32", a, lanes) for a in at], body)
            for address, value in zip(at, acc, strict=True):
                b.store(value, pointer(b, address, value.type), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return tile


def make_weigh(dtype: str) -> tuple[Callable, tuple]:
    """weigh(p, p_stride, C, v, v_stride, n, D, o, o_stride): strides in bytes; p, o are f32, v is `dtype`."""
    wide, narrow = _weigh_tile(dtype, 4, 2, LANES), _weigh_tile(dtype, 1, 2, LANES)
    wide_single, single = _weigh_tile(dtype, 4, 1, LANES), _weigh_tile(dtype, 1, 1, LANES)
    one = _weigh_tile(dtype, 1, 1, 1)
    size = ITEM_NBYTES[dtype]

    @njit
    def columns(p, p_stride, v, v_stride, n, D, o, o_stride, c):
        """Columns of one row (the last, odd rows)."""
        pc, oc = p + c * p_stride, o + c * o_stride
        d = 0
        while d + 2 * LANES <= D:
            narrow(pc, p_stride, v + size * d, v_stride, n, oc + 4 * d, o_stride)
            d += 2 * LANES
        while d + LANES <= D:
            single(pc, p_stride, v + size * d, v_stride, n, oc + 4 * d, o_stride)
            d += LANES
        return d

    @njit
    def tail(p, p_stride, C, v, v_stride, n, d, D, o, o_stride):
        while d < D:
            for c in range(C):
                one(p + c * p_stride, p_stride, v + size * d, v_stride, n, o + c * o_stride + 4 * d, o_stride)
            d += 1

    def weigh(p, p_stride, C, v, v_stride, n, D, o, o_stride):
        whole = D // LANES * LANES
        c = 0
        while c + 4 <= C:
            pc, oc = p + c * p_stride, o + c * o_stride
            d = 0
            while d + 2 * LANES <= whole:
                wide(pc, p_stride, v + size * d, v_stride, n, oc + 4 * d, o_stride)
                d += 2 * LANES
            while d < whole:
                wide_single(pc, p_stride, v + size * d, v_stride, n, oc + 4 * d, o_stride)
                d += LANES
            c += 4
        while c < C:
            columns(p, p_stride, v, v_stride, n, whole, o, o_stride, c)
            c += 1
        if whole < D:
            tail(p, p_stride, C, v, v_stride, n, whole, D, o, o_stride)

    return weigh, (types.int64,) * 9


def _store_as(dtype: str) -> Any:
    store, one = STORE[dtype]
    size = ITEM_NBYTES[dtype]

    @njit
    def store_floats(out, x, n):
        k = 0
        while k + LANES <= n:
            store(out + size * k, load_f32(x + 4 * k))
            k += LANES
        while k < n:
            one(out + size * k, f32_at(x + 4 * k))
            k += 1

    return store_floats


_store_f32, _store_f16, _store_bf16 = (_store_as(dtype) for dtype in FLOAT_DTYPES)


@njit
def store_row(out, dtype, x, n):
    """Store n f32 at x as the float dtype with this code (0 f32, 1 f16, 2 bf16)."""
    if dtype == 0:
        _store_f32(out, x, n)
    elif dtype == 1:
        _store_f16(out, x, n)
    else:
        _store_bf16(out, x, n)
