"""Tensor maps: descriptions of arrays that the copy engine takes boxes from (compute capability 9.0 on)."""

from __future__ import annotations

import ctypes

import numpy as np

from .gate import call, cu

NBYTES = 128
_TYPES = {
    "f16": cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    "bf16": cu.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
}
_ELEMENT_NBYTES = 2


def encode_tensor_map(address: int, dtype: str, shape: tuple[int, int], box: tuple[int, int]) -> np.ndarray:
    """The map of an array [rows, cols] whose boxes go to shared memory swizzled by 128 bytes: u8 [128].

    Raises DriverError where the array does not meet the engine's limits (address and rows: multiples of 16 bytes).
    """
    rows, cols = shape
    found = call(
        cu.cuTensorMapEncodeTiled,
        _TYPES[dtype],
        2,
        address,
        [cu.cuuint64_t(cols), cu.cuuint64_t(rows)],
        [cu.cuuint64_t(cols * _ELEMENT_NBYTES)],
        [cu.cuuint32_t(box[1]), cu.cuuint32_t(box[0])],
        [cu.cuuint32_t(1), cu.cuuint32_t(1)],
        cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        cu.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return np.frombuffer(ctypes.string_at(found.getPtr(), NBYTES), np.uint8)
