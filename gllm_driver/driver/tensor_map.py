"""Tensor maps: descriptions of arrays that the copy engine takes boxes from (compute capability 9.0 on)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from .gate import call, cu, error_of

NBYTES = 128
_ALIGNMENT = 64  # the driver wants it; objects of the binding lie at any multiple of 16, hence the call through ctypes
_NAME = "cuTensorMapEncodeTiled"
_SINCE = 12_000  # the CUDA version that has it in this form
_TYPES = {
    "f16": int(cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
    "bf16": int(cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
}
_ELEMENT_NBYTES = 2
_NO_INTERLEAVE = int(cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE)
_SWIZZLE = int(cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)
_PROMOTION = int(cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
_ZEROS_OUTSIDE = int(cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)

_U64_PAIR, _U32_PAIR = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),  # map, type, rank, address
    *(ctypes.c_void_p,) * 4,  # sizes, strides, box, steps
    *(ctypes.c_int,) * 4,
)


@functools.cache
def _function() -> Callable[..., int]:
    address, _ = call(cu.cuGetProcAddress, _NAME.encode(), _SINCE, 0)
    return _PROTOTYPE(int(address))


def encode_tensor_map(address: int, dtype: str, shape: tuple[int, int], box: tuple[int, int]) -> np.ndarray:
    """The map of an array [rows, cols] whose boxes go to shared memory swizzled by 128 bytes: u8 [128].

    Raises DriverError where the array does not meet the engine's limits (address and rows: multiples of 16 bytes).
    """
    rows, cols = shape
    memory = np.zeros(NBYTES + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    code = _function()(
        memory.ctypes.data + start,
        _TYPES[dtype],
        2,
        address,
        _U64_PAIR(cols, rows),
        _U64_PAIR(cols * _ELEMENT_NBYTES),
        _U32_PAIR(box[1], box[0]),
        _U32_PAIR(1, 1),
        _NO_INTERLEAVE,
        _SWIZZLE,
        _PROMOTION,
        _ZEROS_OUTSIDE,
    )
    if code:
        raise error_of(_NAME, code)
    return memory[start : start + NBYTES]
