"""The element types of GGUF files. To make one readable: give it a row in types.py and a format in quant/formats."""

from __future__ import annotations

from ..types import DTYPES, DType

_NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
_OTHER_NAMES = {"Q1_0": "int1_128"}  # the same bytes as one of our own formats
_NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")


def _dtype(name: str) -> DType | None:
    return None if name in _NO_WEIGHTS else DTYPES.get(_OTHER_NAMES.get(name, name.lower()))


# ggml tensor types: id → (name, how we read it; None: not at all).
TENSOR_TYPES: dict[int, tuple[str, DType | None]] = {i: (name, _dtype(name)) for i, name in _NAMES.items()}
READABLE = tuple(name for name, dtype in TENSOR_TYPES.values() if dtype is not None)
