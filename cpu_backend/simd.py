"""SIMD vocabulary: numba types whose LLVM value is a vector, and functions on them that stay in registers.

A kernel reads as ordinary numba code: `acc = fma(load_f32(a), load_f32(b), acc)`. Vectors have `LANES` f32 lanes (16 on
AVX-512, 8 on AVX2, 4 on NEON). Addresses are plain int64: kernels get them from their argument structs, and no array
object, bounds check or reference count stands between a loop and its data.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .target import current

LANES = current().lanes

F32 = ir.FloatType()
F16 = ir.HalfType()
I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


class Vector(types.Type):
    """A numba type for <lanes x element>."""

    def __init__(self, element: ir.Type, lanes: int, name: str) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"simd<{lanes}x{name}>")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


vf32 = Vector(F32, LANES, "f32")
_address = types.int64


def pointer(b: ir.IRBuilder, address: ir.Value, pointee: ir.Type) -> ir.Value:
    return b.inttoptr(address, pointee.as_pointer())


def call_llvm(b: ir.IRBuilder, name: str, ret: ir.Type, args: list[ir.Value]) -> ir.Value:
    """Call the LLVM intrinsic `name`."""
    fn = cgutils.get_or_insert_function(b.module, ir.FunctionType(ret, [a.type for a in args]), name)
    return b.call(fn, args)


def llvm_fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    suffix = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    return call_llvm(b, f"llvm.fma.{suffix}", x.type, [x, y, z])


def llvm_splat(b: ir.IRBuilder, x: ir.Value, lanes: int = LANES) -> ir.Value:
    undef = ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined)
    one = b.insert_element(undef, x, ir.Constant(I32, 0))
    return b.shuffle_vector(one, undef, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def llvm_hsum(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Sum of the lanes as a balanced tree: halves are added until one lane is left (a fixed order)."""
    lanes = x.type.count
    while lanes > 1:
        lanes //= 2
        lo = b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes))))
        hi = b.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, lanes), list(range(lanes, 2 * lanes))))
        x = b.fadd(lo, hi)
    return b.extract_element(x, ir.Constant(I32, 0))


# --- float formats: how `lanes` elements at an address become f32 lanes, and back ----------------------------------


def llvm_load_float(b: ir.IRBuilder, dtype: str, address: ir.Value, lanes: int) -> ir.Value:
    """Load `lanes` consecutive elements of a float dtype as <lanes x f32> (any alignment)."""
    if dtype == "f32":
        return b.load(pointer(b, address, ir.VectorType(F32, lanes)), align=4)
    if dtype == "f16":
        return b.fpext(b.load(pointer(b, address, ir.VectorType(F16, lanes)), align=2), ir.VectorType(F32, lanes))
    bits = b.load(pointer(b, address, ir.VectorType(I16, lanes)), align=2)
    wide = ir.VectorType(I32, lanes)
    return b.bitcast(b.shl(b.zext(bits, wide), ir.Constant(wide, [16] * lanes)), ir.VectorType(F32, lanes))


def llvm_store_float(b: ir.IRBuilder, dtype: str, address: ir.Value, x: ir.Value) -> None:
    """Store <lanes x f32> as a float dtype, rounding to nearest even; NaN stays NaN."""
    lanes = x.type.count
    if dtype == "f32":
        b.store(x, pointer(b, address, x.type), align=4)
    elif dtype == "f16":
        b.store(b.fptrunc(x, ir.VectorType(F16, lanes)), pointer(b, address, ir.VectorType(F16, lanes)), align=2)
    else:
        wide = ir.VectorType(I32, lanes)

        def const(value: int) -> ir.Constant:
            return ir.Constant(wide, [value] * lanes)

        bits = b.bitcast(x, wide)
        odd = b.and_(b.lshr(bits, const(16)), const(1))
        rounded = b.add(bits, b.add(odd, const(0x7FFF)))
        quiet = b.or_(bits, const(0x400000))
        nan = b.fcmp_unordered("uno", x, x)
        top = b.lshr(b.select(nan, quiet, rounded), const(16))
        b.store(b.trunc(top, ir.VectorType(I16, lanes)), pointer(b, address, ir.VectorType(I16, lanes)), align=2)


def _loader(dtype: str) -> tuple[Callable, Callable, Callable, Callable]:
    """(vector load, vector store, scalar load, scalar store) of a float dtype."""

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        return vf32(_address), lambda c, b, s, a: llvm_load_float(b, dtype, a[0], LANES)

    @intrinsic
    def store(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
            llvm_store_float(b, dtype, a[0], a[1])
            return c.get_dummy_value()

        return types.void(_address, vf32), codegen

    zero = ir.Constant(I32, 0)

    @intrinsic
    def load_one(typingctx: Any, address: Any) -> Any:
        def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
            return b.extract_element(llvm_load_float(b, dtype, a[0], 1), zero)

        return types.float32(_address), codegen

    @intrinsic
    def store_one(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
            one = b.insert_element(ir.Constant(ir.VectorType(F32, 1), ir.Undefined), a[1], zero)
            llvm_store_float(b, dtype, a[0], one)
            return c.get_dummy_value()

        return types.void(_address, types.float32), codegen

    return load, store, load_one, store_one


load_f32, store_f32, f32_at, put_f32 = _loader("f32")
load_f16, store_f16, f16_at, put_f16 = _loader("f16")
load_bf16, store_bf16, bf16_at, put_bf16 = _loader("bf16")


@intrinsic
def f64_at(typingctx: Any, address: Any) -> Any:
    return types.float64(_address), lambda c, b, s, a: b.load(pointer(b, a[0], ir.DoubleType()), align=8)


# --- integers in memory --------------------------------------------------------------------------------------------


def _int_access(bits: int, numba_type: types.Integer) -> tuple[Callable, Callable]:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
            value = b.load(pointer(b, a[0], ir.IntType(bits)), align=1)
            if bits == 64:
                return value
            return b.sext(value, I64) if numba_type.signed else b.zext(value, I64)

        return types.int64(_address), codegen

    @intrinsic
    def store(typingctx: Any, address: Any, x: Any) -> Any:
        def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
            value = a[1] if bits == 64 else b.trunc(a[1], ir.IntType(bits))
            b.store(value, pointer(b, a[0], ir.IntType(bits)), align=1)
            return c.get_dummy_value()

        return types.void(_address, types.int64), codegen

    return load, store


u8_at, put_u8 = _int_access(8, types.uint8)
i32_at, put_i32 = _int_access(32, types.int32)
i64_at, put_i64 = _int_access(64, types.int64)


@intrinsic
def f32_bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float as an int64 in [0, 2**32)."""
    return types.int64(types.float32), lambda c, b, s, a: b.zext(b.bitcast(a[0], I32), I64)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _binary(op: Any, name: str) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: tuple, kws: dict) -> Any:
            if args == (vf32, vf32):
                return signature(vf32, vf32, vf32)
            return None

    lower_builtin(op, vf32, vf32)(lambda c, b, s, a: getattr(b, name)(a[0], a[1]))


_binary(operator.add, "fadd")
_binary(operator.sub, "fsub")
_binary(operator.mul, "fmul")
_binary(operator.truediv, "fdiv")


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once."""
    return vf32(vf32, vf32, vf32), lambda c, b, s, a: llvm_fma(b, *a)


@intrinsic
def splat(typingctx: Any, x: Any) -> Any:
    """A vector with x in every lane."""
    return vf32(types.float32), lambda c, b, s, a: llvm_splat(b, a[0])


@intrinsic
def lane0(typingctx: Any, x: Any) -> Any:
    """The first lane."""
    return types.float32(vf32), lambda c, b, s, a: b.extract_element(a[0], ir.Constant(I32, 0))


@intrinsic
def hsum(typingctx: Any, x: Any) -> Any:
    """Sum of the lanes, in a fixed tree order."""
    return types.float32(vf32), lambda c, b, s, a: llvm_hsum(b, a[0])


@intrinsic
def vmax(typingctx: Any, x: Any, y: Any) -> Any:
    """Lane-wise maximum: x where x > y, else y (so NaN in x yields y)."""
    return vf32(vf32, vf32), lambda c, b, s, a: b.select(b.fcmp_ordered(">", a[0], a[1]), a[0], a[1])


@intrinsic
def choose_negative(typingctx: Any, x: Any, negative: Any, other: Any) -> Any:
    """Lane by lane `negative` where x < 0, else `other`."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        zero = ir.Constant(vf32.llvm, [0.0] * LANES)
        return b.select(b.fcmp_ordered("<", a[0], zero), a[1], a[2])

    return vf32(vf32, vf32, vf32), codegen


@intrinsic
def ramp(typingctx: Any) -> Any:
    """0, 1, 2, … in the lanes."""
    return vf32(), lambda c, b, s, a: ir.Constant(vf32.llvm, [float(lane) for lane in range(LANES)])


@intrinsic
def hmax(typingctx: Any, x: Any) -> Any:
    """Greatest lane."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        return call_llvm(b, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, [a[0]])

    return types.float32(vf32), codegen


@intrinsic
def vexp(typingctx: Any, x: Any) -> Any:
    """e**x per lane, f32, about 1 ulp: range reduction by ln 2 in two parts, degree-6 minimax (Cephes expf).

    Below −87.3 the result is 0, so masked scores of −inf contribute exactly nothing; above 88.3 it is +inf.
    """

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        vec, ints = vf32.llvm, ir.VectorType(I32, LANES)

        def k(v: float) -> ir.Constant:
            return ir.Constant(vec, [v] * LANES)

        x = a[0]
        low = b.fcmp_ordered("<", x, k(-87.33654022216797))
        high = b.fcmp_ordered(">", x, k(88.3762588500976))
        nan = b.fcmp_unordered("uno", x, x)
        safe = b.select(b.or_(b.or_(low, high), nan), k(0.0), x)
        n = call_llvm(b, f"llvm.rint.v{LANES}f32", vec, [b.fmul(safe, k(1.4426950216293335))])
        r = llvm_fma(b, n, k(-0.693359375), safe)
        r = llvm_fma(b, n, k(2.1219444170128554e-4), r)
        p = k(1.9875691214110702e-4)
        for coefficient in (
            1.3981999363750219e-3,
            8.3334520459175110e-3,
            4.1665796190500259e-2,
            1.6666665673255920e-1,
            5.0000000000000000e-1,
        ):
            p = llvm_fma(b, p, r, k(coefficient))
        y = b.fadd(llvm_fma(b, p, b.fmul(r, r), r), k(1.0))
        exponent = b.shl(b.fptosi(n, ints), ir.Constant(ints, [23] * LANES))
        y = b.bitcast(b.add(b.bitcast(y, ints), exponent), vec)
        y = b.select(low, k(0.0), b.select(high, k(float("inf")), y))
        return b.select(nan, x, y)

    return vf32(vf32), codegen


# --- addresses, atomics, calls -------------------------------------------------------------------------------------


@intrinsic
def fetch_add(typingctx: Any, address: Any, n: Any) -> Any:
    """Atomically add n to the i64 at address and return what was there."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.atomic_rmw("add", pointer(b, a[0], I64), a[1], "seq_cst")

    return types.int64(_address, types.int64), codegen


@intrinsic
def exchange(typingctx: Any, address: Any, n: Any) -> Any:
    """Atomically put n into the i64 at address and return what was there."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        return b.atomic_rmw("xchg", pointer(b, a[0], I64), a[1], "seq_cst")

    return types.int64(_address, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    return types.int64(_address), lambda c, b, s, a: b.load_atomic(pointer(b, a[0], I64), "seq_cst", 8)


@intrinsic
def atomic_store(typingctx: Any, address: Any, n: Any) -> Any:
    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        b.store_atomic(a[1], pointer(b, a[0], I64), "seq_cst", 8)
        return c.get_dummy_value()

    return types.void(_address, types.int64), codegen


@intrinsic
def cpu_pause(typingctx: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        if current().triple.startswith("x86_64"):
            call_llvm(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        else:
            call_llvm(b, "llvm.aarch64.isb", ir.VoidType(), [ir.Constant(I32, 15)])
        return c.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_address(typingctx: Any, address: Any, args: Any) -> Any:
    """Call the compiled function at `address` with a tuple of int64 arguments."""

    def codegen(c: Any, b: Any, s: Any, a: Any) -> Any:
        values = cgutils.unpack_tuple(b, a[1])
        fn = b.inttoptr(a[0], ir.FunctionType(ir.VoidType(), [v.type for v in values]).as_pointer())
        b.call(fn, values)
        return c.get_dummy_value()

    return types.void(_address, args), codegen
