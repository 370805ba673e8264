"""Argument structs inside numba: `a.eps` reads a field of the struct at an address, with no object in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import lower_getattr_generic, models, register_model

from .simd import F32, I32, I64, pointer


class Struct(types.Type):
    """Address of a struct with the layout of a numpy structured dtype. `.address` is the address itself.

    i32 fields read as int64, so index arithmetic is 64-bit throughout; an array field reads as its address.
    """

    def __init__(self, name: str, dtype: np.dtype) -> None:
        self.fields_at = {n: ("array" if t[0].shape else t[0].name, int(t[1])) for n, t in (dtype.fields or {}).items()}
        super().__init__(name=f"struct<{name}:{dtype}>")


@register_model(Struct)
class _StructModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Struct) -> None:
        super().__init__(dmm, fe_type, I64)


@infer_getattr
class _StructAttributes(AttributeTemplate):
    key = Struct

    def generic_resolve(self, struct: Struct, attr: str) -> Any:
        if attr == "address":
            return types.int64
        if attr not in struct.fields_at:
            return None
        return types.float32 if struct.fields_at[attr][0] == "float32" else types.int64


@lower_getattr_generic(Struct)
def _read_field(context: Any, b: ir.IRBuilder, struct: Struct, value: ir.Value, attr: str) -> ir.Value:
    if attr == "address":
        return value
    kind, offset = struct.fields_at[attr]
    address = b.add(value, ir.Constant(I64, offset))
    if kind == "array":
        return address
    if kind == "float32":
        return b.load(pointer(b, address, F32), align=4)
    if kind == "int32":
        return b.sext(b.load(pointer(b, address, I32), align=4), I64)
    assert kind == "int64", f"{struct.name}.{attr} has type {kind}, which kernels do not read"
    return b.load(pointer(b, address, I64), align=8)
