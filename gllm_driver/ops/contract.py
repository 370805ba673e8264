"""The contract of an op as data: arrays, scalars, their struct, and the one place where calls are checked.

From one `Contract` come the check (`bind`), the argument struct every backend's kernel receives by the same layout, the
ABI hash that ties prebuilt binaries to it, and the tests (`reference`, `cases`). Kernels validate nothing themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import ContractError
from ..packed_types import PackedDType
from ..types import WEIGHT_DTYPES, Tensor

Role = Literal["in", "out", "inout"]


@dataclass(frozen=True)
class Array:
    """One array argument: `axes` name dims of the op (or are fixed integers), outermost first."""

    name: str
    axes: tuple[str | int, ...]
    dtypes: tuple[str, ...] = ("f32",)
    role: Role = "in"
    optional: bool = False
    doc: str = ""
    packed: bool = False  # may also come in a device's packed types, as op pack_weight makes them
    error_axes: int = 1  # trailing axes whose largest magnitude errors are relative to

    @property
    def has_dtype_field(self) -> bool:
        """Kernels are told the element type of arrays that may come in several."""
        return len(self.dtypes) > 1

    @property
    def dtypes_text(self) -> str:
        """The element types in words; stored weights have too many to list."""
        return "f32 or f16 or bf16 or a block format" if self.dtypes == WEIGHT_DTYPES else " or ".join(self.dtypes)


@dataclass(frozen=True)
class Scalar:
    """One scalar argument with its range (inclusive)."""

    name: str
    ctype: Literal["i32", "f32"]
    low: float = float("-inf")
    high: float = float("inf")
    default: float | None = None
    doc: str = ""


@dataclass(frozen=True)
class Rule:
    """A condition on the solved dims and scalars, with the words to say when it does not hold."""

    test: Callable[[Mapping[str, Any]], bool]
    message: str


@dataclass(frozen=True)
class Case:
    """One test input: numpy arrays by name (outputs and absent optionals left out), scalars, and a label.

    Float arrays hold values, not storage: the suite stores each one in every dtype its contract lists, leaving out
    block formats whose blocks do not divide the row. `storage` narrows that list per array. `aliases` maps an output to
    the input whose memory it shares. `condition` multiplies the tolerance: by how much the problem itself, not the
    kernel, amplifies rounding (large attention scores).
    """

    label: str
    arrays: Mapping[str, np.ndarray]
    scalars: Mapping[str, float] = field(default_factory=dict)
    storage: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    condition: float = 1.0


@dataclass(frozen=True)
class Contract:
    """What an op computes and on what. `dims` says what each axis symbol means.

    reference(arrays, scalars) takes float64 and integer arrays by name, absent optionals left out, and returns every
    out and inout array: slow, plain, from the definition. `tolerance`, by the dtype an output is stored in, bounds the
    error relative to the largest magnitude along the output's last `error_axes` axes; NaN, infinities and rows of zeros
    are exact.
    """

    name: str
    doc: str
    dims: Mapping[str, str]
    arrays: tuple[Array, ...]
    scalars: tuple[Scalar, ...] = ()
    rules: tuple[Rule, ...] = ()
    constants: Mapping[str, int] = field(default_factory=dict)  # numbers kernels know by heart
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"f32": 1e-5, "f16": 2e-3, "bf16": 1.6e-2})
    reference: Callable[..., Mapping[str, np.ndarray]] | None = None
    cases: Callable[[], Iterator[Case]] | None = None

    @property
    def struct(self) -> np.dtype:
        """The argument struct: addresses, then dims (i32), dtype codes (i32) and scalars, in order of declaration.

        Natural C alignment; a missing optional array has address 0 and dtype code −1 is never read.
        """
        fields: list[tuple[str, str]] = [(a.name, "<i8") for a in self.arrays]
        fields += [(dim, "<i4") for dim in self.dims]
        fields += [(f"{a.name}_dtype", "<i4") for a in self.arrays if a.has_dtype_field]
        fields += [(s.name, "<i4" if s.ctype == "i32" else "<f4") for s in self.scalars]
        return np.dtype(fields, align=True)

    @property
    def abi_hash(self) -> str:
        """Changes whenever a compiled kernel would read the struct wrongly."""
        layout = [(n, str(t[0]), t[1]) for n, t in (self.struct.fields or {}).items()]
        return hashlib.sha256(repr((self.name, layout, self.struct.itemsize)).encode()).hexdigest()[:16]

    def bind(self, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> np.ndarray:
        """Check a call and pack it: a 0-d structured array with the layout `struct`.

        Raises ContractError naming op, argument, axis, what was expected (and from where) and what came.
        """
        scalars = dict(scalars or {})
        packed = np.zeros((), self.struct)
        solved: dict[str, Any] = {}
        origin: dict[str, str] = {}
        unknown = set(arrays) - {a.name for a in self.arrays} | set(scalars) - {s.name for s in self.scalars}
        if unknown:
            raise ContractError(self.name, ", ".join(sorted(unknown)), "is not an argument of this op")
        for array in self.arrays:
            tensor = arrays.get(array.name)
            if tensor is None:
                if not array.optional:
                    raise ContractError(self.name, array.name, "is required")
                continue
            self._check_array(array, tensor, solved, origin)
            packed[array.name] = tensor.address
            if array.has_dtype_field:
                packed[f"{array.name}_dtype"] = tensor.dtype.code
        for dim in self.dims:
            if dim not in solved:
                raise ContractError(self.name, dim, "cannot be known: no array given has this axis")
            packed[dim] = solved[dim]
        for scalar in self.scalars:
            value = scalars.get(scalar.name, scalar.default)
            if value is None:
                raise ContractError(self.name, scalar.name, "is required")
            if not scalar.low <= value <= scalar.high:
                raise ContractError(
                    self.name, scalar.name, f"must be in [{scalar.low}, {scalar.high}], got {value} ({scalar.doc})"
                )
            packed[scalar.name] = solved[scalar.name] = value
        given = solved | {f"has_{a.name}": arrays.get(a.name) is not None for a in self.arrays}
        for rule in self.rules:
            if not rule.test(given):
                raise ContractError(self.name, "arguments", f"do not fit: {rule.message} ({_values(solved)})")
        return packed

    def _check_array(self, array: Array, tensor: Tensor, solved: dict[str, Any], origin: dict[str, str]) -> None:
        if tensor.dtype.name not in array.dtypes and not (array.packed and isinstance(tensor.dtype, PackedDType)):
            raise ContractError(self.name, array.name, f"has dtype {tensor.dtype.name}, expected {array.dtypes_text}")
        if len(tensor.shape) != len(array.axes):
            raise ContractError(
                self.name, array.name, f"has shape {tensor.shape}, expected axes [{', '.join(map(str, array.axes))}]"
            )
        for i, (axis, n) in enumerate(zip(array.axes, tensor.shape, strict=True)):
            if isinstance(axis, int):
                expected, source = axis, "the contract"
            else:
                expected, source = solved.setdefault(axis, n), origin.setdefault(axis, array.name)
            if n != expected:
                raise ContractError(self.name, array.name, f"axis {i} is {axis}={expected} (from {source}), got {n}")
        if tensor.address == 0 and tensor.nbytes:
            raise ContractError(self.name, array.name, "has no memory (address 0)")


def _values(solved: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in solved.items())
