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


def weights_are_unsigned(greatest: int) -> bool:
    """Whether `emit_byte_dot` takes weights as unsigned bytes, given the greatest of them."""
    kind = current().int_dot
    return kind in ("avx512-vnni", "avx-vnni") or (kind == "avx2" and greatest <= 127)


def emit_byte_dot(
    b: ir.IRBuilder, acc: ir.Value, ws: list[ir.Value], xs: list[ir.Value], unsigned: bool, greatest: int
) -> ir.Value:
    """acc[l] += Σ_v Σ_{j<4} ws[v][4l+j]·xs[v][4l+j] for byte vectors and an i32 accumulator of a quarter as many lanes.

    xs are signed and never −128; ws are as `weights_are_unsigned` says, at most `greatest`.
    """
    lanes = acc.type.count
    kind = current().int_dot
    if kind in ("avx512-vnni", "avx-vnni"):
        for w, x in zip(ws, xs, strict=True):
            acc = call_llvm(b, f"llvm.x86.avx512.vpdpbusd.{lanes * 32}", acc.type, [acc, w, x])
        return acc
    native = {"avx2": 8, "neon-dotprod": 4}.get(kind, lanes)
    if native < lanes:
        count = lanes // native
        parts = [
            emit_byte_dot(
                b,
                _slice(b, acc, p, native),
                [_slice(b, w, p, 4 * native) for w in ws],
                [_slice(b, x, p, 4 * native) for x in xs],
                unsigned,
                greatest,
            )
            for p in range(count)
        ]
        return _concat(b, parts)
    if kind == "avx2":
        return _avx2_dot(b, acc, ws, xs, unsigned, greatest)
    for w, x in zip(ws, xs, strict=True):
        if kind == "neon-dotprod":
            acc = call_llvm(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, w, x])
            continue
        wide = ir.VectorType(I32, 4 * lanes)
        product = b.mul(b.sext(w, wide), b.sext(x, wide))
        for j in range(4):
            mask = ir.Constant(ir.VectorType(I32, lanes), [4 * lane + j for lane in range(lanes)])
            acc = b.add(acc, b.shuffle_vector(product, product, mask))
    return acc


def _avx2_dot(
    b: ir.IRBuilder, acc: ir.Value, ws: list[ir.Value], xs: list[ir.Value], unsigned: bool, greatest: int
) -> ir.Value:
    """Products of neighbours summed in 16 bits, as many vectors of them as fit, then in 32."""
    i16x16 = ir.VectorType(ir.IntType(16), 16)
    fit = max(1, 32767 // (2 * 127 * greatest)) if unsigned else 1
    sums: list[ir.Value] = []
    for w, x in zip(ws, xs, strict=True):
        if not unsigned:
            zero = ir.Constant(w.type, [0] * 32)
            x = call_llvm(b, "llvm.x86.avx2.psign.b", x.type, [x, w])
            w = b.select(b.icmp_signed("<", w, zero), b.sub(zero, w), w)
        sums.append(call_llvm(b, "llvm.x86.avx2.pmadd.ub.sw", i16x16, [w, x]))
    ones = ir.Constant(i16x16, [1] * 16)
    for start in range(0, len(sums), fit):
        total = sums[start]
        for one in sums[start + 1 : start + fit]:
            total = b.add(total, one)
        acc = b.add(acc, call_llvm(b, "llvm.x86.avx2.pmadd.wd", acc.type, [total, ones]))
    return acc


def byte_table(b: ir.IRBuilder, values: list[int], index: ir.Value) -> ir.Value:
    """values[i] for each byte i < 16 of a vector of 64."""
    target = current()
    native = {16: 64, 8: 32}.get(target.lanes, 16)
    kind = ir.VectorType(ir.IntType(8), native)
    table = ir.Constant(kind, [v & 255 for v in values] * (native // 16))
    x86 = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.ssse3.pshuf.b.128"}
    parts = []
    for p in range(index.type.count // native):
        piece = _slice(b, index, p, native)
        if target.triple.startswith("aarch64") or target.triple.startswith("arm64"):
            parts.append(call_llvm(b, "llvm.aarch64.neon.tbl1.v16i8", kind, [table, piece]))
        else:
            parts.append(call_llvm(b, x86[native], kind, [table, piece]))
    return _concat(b, parts)


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
