"""Helpers to write LLVM IR for register-tiled inner loops: numba has no way to say "keep these in registers"."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .simd import I32, I64, call_llvm, pointer
from .target import current


def i64(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def emit_loop(
    b: ir.IRBuilder,
    count: ir.Value,
    carried: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`for i in range(count): carried = body(i, carried)`; the carried values live in registers. Leaves b after it."""
    before = b.block
    head = b.append_basic_block("loop.head")
    inside = b.append_basic_block("loop.body")
    after = b.append_basic_block("loop.end")
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    values = [b.phi(v.type) for v in carried]
    b.cbranch(b.icmp_signed("<", i, count), inside, after)
    b.position_at_end(inside)
    new = body(i, list(values))
    last = b.block
    i.add_incoming(i64(0), before)
    i.add_incoming(b.add(i, i64(1)), last)
    for phi, start, value in zip(values, carried, new, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, last)
    b.branch(head)
    b.position_at_end(after)
    return list(values)


def prefetch(b: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at address (any address: it cannot fault)."""
    call_llvm(
        b,
        "llvm.prefetch.p0",
        ir.VoidType(),
        [pointer(b, address, ir.IntType(8)), ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)],
    )


def emit_byte_dot(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc[l] += Σ_{j<4} w[4l+j]·x[4l+j] for byte vectors w, x and an i32 accumulator with a quarter of their lanes.

    x is signed. w is unsigned where the target multiplies unsigned by signed bytes (`weights_are_unsigned`).
    """
    lanes = acc.type.count
    kind = current().int_dot
    if kind in ("avx512-vnni", "avx-vnni"):
        name = f"llvm.x86.avx512.vpdpbusd.{lanes * 32}"
        return call_llvm(b, name, acc.type, [acc, w, x])
    if kind == "avx2" and lanes == 8:
        i16x16, i32x8 = ir.VectorType(ir.IntType(16), 16), acc.type
        zero = ir.Constant(w.type, [0] * 32)
        magnitude = b.select(b.icmp_signed("<", w, zero), b.sub(zero, w), w)
        signed = call_llvm(b, "llvm.x86.avx2.psign.b", x.type, [x, w])
        pairs = call_llvm(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16, [magnitude, signed])
        ones = ir.Constant(i16x16, [1] * 16)
        return b.add(acc, call_llvm(b, "llvm.x86.avx2.pmadd.wd", i32x8, [pairs, ones]))
    if kind == "neon-dotprod":
        quarters = [
            _neon_sdot(b, *(_slice(b, v, q, n) for v, n in ((acc, 4), (w, 16), (x, 16)))) for q in range(lanes // 4)
        ]
        return _concat(b, quarters)
    wide = ir.VectorType(I32, 4 * lanes)
    product = b.mul(b.sext(w, wide), b.sext(x, wide))
    for j in range(4):
        mask = ir.Constant(ir.VectorType(I32, lanes), [4 * lane + j for lane in range(lanes)])
        acc = b.add(acc, b.shuffle_vector(product, product, mask))
    return acc


def weights_are_unsigned() -> bool:
    """Whether `emit_byte_dot` wants weights as unsigned bytes (offset by their zero point) on this target."""
    return current().int_dot in ("avx512-vnni", "avx-vnni")


def _neon_sdot(b: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    return call_llvm(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])


def _slice(b: ir.IRBuilder, vector: ir.Value, index: int, lanes: int) -> ir.Value:
    if vector.type.count == lanes:
        return vector
    mask = ir.Constant(ir.VectorType(I32, lanes), list(range(index * lanes, (index + 1) * lanes)))
    return b.shuffle_vector(vector, vector, mask)


def _concat(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        lanes = 2 * parts[0].type.count
        mask = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        parts = [b.shuffle_vector(lo, hi, mask) for lo, hi in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
