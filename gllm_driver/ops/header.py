"""C headers generated from the contracts: what kernels know of argument structs, element types and sampling records.

`headers()` is all of them by file name. Each struct carries static_asserts for its size and every offset, so a kernel
compiled against one layout cannot be built against another, and `Contract.abi_hash` as a constant.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..types import DTYPES
from . import CONTRACTS
from ._sample_params import PARAM_WORDS, PARAMS, SEEN_IN_PROMPT
from .contract import Array, Contract

_C_ELEMENTS = {"f32": "float", "f64": "double", "i32": "int32_t", "i64": "int64_t", "u8": "uint8_t"}
_C_FIELDS = {"int32": "int32_t", "float32": "float", "uint64": "uint64_t"}
_NOTE = """// Generated from gllm_driver/ops. Do not edit.
#pragma once

#include <cstddef>
#include <cstdint>
"""


def struct_name(op: str) -> str:
    """rms_norm → RmsNormArgs."""
    return "".join(part.capitalize() for part in op.split("_")) + "Args"


def _pointer(array: Array) -> str:
    """The C type of an array's address: of its element where the contract has one type only."""
    element = "void" if array.has_dtype_field else _C_ELEMENTS.get(array.dtypes[0], "void")
    return f"const {element} *" if array.role == "in" else f"{element} *"


def args_header(contract: Contract) -> str:
    """The argument struct of an op, field by field as `Contract.struct` lays it out."""
    struct, name = contract.struct, struct_name(contract.name)
    fields: Mapping[str, Any] = struct.fields or {}
    arrays = {a.name: a for a in contract.arrays}
    lines, checks = [], []
    for field, (dtype, offset, *_) in fields.items():
        if field in arrays:
            array = arrays[field]
            axes = ", ".join(map(str, array.axes))
            absent = "; null when absent" if array.optional else ""
            lines.append(f"  {_pointer(array)}{field};  // [{axes}] {array.dtypes_text}{absent}")
        else:
            why = contract.dims.get(field, "")
            lines.append(f"  {_C_FIELDS[dtype.name]} {field};" + (f"  // {why}" if why else ""))
        checks.append(f'static_assert(offsetof({name}, {field}) == {offset}, "{contract.name}: {field} moved");')
    return "\n".join(
        [
            _NOTE,
            f"struct {name} {{",
            *lines,
            "};",
            f'static_assert(sizeof({name}) == {struct.itemsize}, "{contract.name}: size changed");',
            *checks,
            "",
        ]
    )


def dtypes_header() -> str:
    """Codes and block sizes of the element types."""
    lines = []
    for dtype in DTYPES.values():
        name = dtype.name.upper()
        lines.append(
            f"constexpr int kCode{name} = {dtype.code}, kBlockSize{name} = {dtype.block_size}, "
            f"kBlockNbytes{name} = {dtype.block_nbytes};"
        )
    return "\n".join([_NOTE, *lines, ""])


def sample_params_header() -> str:
    """The record that `sample` reads per sequence."""
    fields = [f"  {_C_FIELDS[d.name]} {n};" for n, (d, *_) in (PARAMS.fields or {}).items()]
    return "\n".join(
        [
            _NOTE,
            "struct SampleParams {",
            *fields,
            "};",
            f'static_assert(sizeof(SampleParams) == {4 * PARAM_WORDS}, "a row of params");',
            f"constexpr int kSeenInPrompt = {SEEN_IN_PROMPT};",
            "",
        ]
    )


def headers() -> dict[str, str]:
    """Every generated header: file name → text."""
    texts = {f"{op}_args.h": args_header(contract) for op, contract in CONTRACTS.items()}
    return texts | {"dtypes.h": dtypes_header(), "sample_params.h": sample_params_header()}


def write_headers(folder: Path) -> None:
    """Write them all, leaving files that are right untouched, so that time stamps tell builds the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in headers().items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(text)
            temporary.replace(path)
