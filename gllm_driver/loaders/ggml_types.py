"""The element types of GGUF files. To make one readable: give its row a DType (and the kernels the code)."""

from __future__ import annotations

from ..types import BF16, F16, F32, Q4_0, Q8_0, DType

# ggml tensor types: id → (name, how we read it; None: not yet).
TENSOR_TYPES: dict[int, tuple[str, DType | None]] = {
    0: ("F32", F32),
    1: ("F16", F16),
    2: ("Q4_0", Q4_0),
    3: ("Q4_1", None),
    6: ("Q5_0", None),
    7: ("Q5_1", None),
    8: ("Q8_0", Q8_0),
    9: ("Q8_1", None),
    10: ("Q2_K", None),
    11: ("Q3_K", None),
    12: ("Q4_K", None),
    13: ("Q5_K", None),
    14: ("Q6_K", None),
    15: ("Q8_K", None),
    16: ("IQ2_XXS", None),
    17: ("IQ2_XS", None),
    18: ("IQ3_XXS", None),
    19: ("IQ1_S", None),
    20: ("IQ4_NL", None),
    21: ("IQ3_S", None),
    22: ("IQ2_S", None),
    23: ("IQ4_XS", None),
    24: ("I8", None),
    25: ("I16", None),
    26: ("I32", None),
    27: ("I64", None),
    28: ("F64", None),
    29: ("IQ1_M", None),
    30: ("BF16", BF16),
    34: ("TQ1_0", None),
    35: ("TQ2_0", None),
    39: ("MXFP4", None),
    40: ("NVFP4", None),
    41: ("Q1_0", None),
}
READABLE = tuple(name for name, dtype in TENSOR_TYPES.values() if dtype is not None)
