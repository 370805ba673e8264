"""Values in the dtypes they are stored in, and arrays in the middle of poisoned memory."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gllm_driver.packed_types import PACKED_DTYPES, PackedDType
from gllm_driver.quant.formats import FORMATS
from gllm_driver.quant.packed import Parts, pack_parts, unpack
from gllm_driver.types import DTYPES, DType, Tensor

Storage = Mapping[str, str]  # dtype name of each array

NUMPY = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
    "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64),
    "u8": np.dtype(np.uint8),
}
GUARD = 128  # poisoned bytes before and after each array


def dtype_named(name: str) -> DType:
    """A stored type, or a packed one."""
    return PACKED_DTYPES.get(name) or DTYPES[name]


def quantized(values: np.ndarray, dtype: PackedDType) -> Parts:
    """[N, K] values in the integers and scales of a packed type: plain rounding."""
    groups = values.reshape(len(values), -1, dtype.block_size).astype(np.float64)
    steps, low, high = (1 << dtype.bits) - 1, groups.min(axis=2), groups.max(axis=2)
    if dtype.kind:
        d = ((high - low) / steps).astype(np.float16)
        inverse = np.where(d == 0, 0, 1 / np.where(d == 0, 1, d.astype(np.float64)))
        a = (np.round(-low * inverse) if dtype.kind == "z" else low).astype(np.float16)
        offset = a.astype(np.float64) if dtype.kind == "z" else -a.astype(np.float64) * inverse
        u = groups * inverse[..., None] + offset[..., None]
    else:
        top, half = np.abs(groups).max(axis=2), 1 << (dtype.bits - 1)
        d = (top / (half - 1 if dtype.bits >= 4 else steps)).astype(np.float16)
        a = np.zeros_like(d)
        inverse = np.where(d == 0, 0, 1 / np.where(d == 0, 1, d.astype(np.float64)))
        u = groups * inverse[..., None]
        u = u + half if dtype.bits >= 4 else (u + steps) / 2
    return Parts(np.clip(np.round(u), 0, steps).astype(np.uint8).reshape(values.shape), d, a)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of `values` as stored in `dtype`."""
    if dtype in PACKED_DTYPES:
        packed = PACKED_DTYPES[dtype]
        with np.errstate(over="ignore"):
            return pack_parts(quantized(values.reshape(-1, values.shape[-1]), packed), packed).reshape(-1)
    if dtype in FORMATS:
        return FORMATS[dtype].quantize(values).reshape(-1)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values).astype(NUMPY[dtype]).reshape(-1).view(np.uint8)


def decode(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the bytes mean: float64, or integers."""
    if dtype in PACKED_DTYPES:
        return unpack(data, PACKED_DTYPES[dtype], shape)
    if dtype in FORMATS:
        return FORMATS[dtype].dequantize(data, shape).astype(np.float64)
    values = data.view(NUMPY[dtype]).reshape(shape)
    return values.astype(np.int64 if dtype.startswith(("i", "u")) else np.float64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` after being stored in `dtype`."""
    return decode(encode(values, dtype), dtype, values.shape)


class Placed:
    """An array in the middle of poisoned memory, `shift` elements off a 64-byte boundary."""

    def __init__(self, data: np.ndarray, dtype: DType, shape: tuple[int, ...], shift: int) -> None:
        element = (
            32 if isinstance(dtype, PackedDType) else 2 if dtype.is_quantized else dtype.block_nbytes
        )  # blocks start with an f16
        poison = 0xA5 if dtype.name.startswith(("i", "u")) else 0xFF  # 0xFF… is NaN in every float type
        self.memory = np.full(data.size + 2 * GUARD + 64 + 8 * max(8, element), poison, np.uint8)
        start = GUARD + (-(self.memory.ctypes.data + GUARD)) % 64 + shift % 8 * element
        self.poison, self.start, self.end = poison, start, start + data.size
        self.data = self.memory[start : self.end]
        self.data[:] = data
        self.before = data.copy()
        self.dtype, self.shape = dtype, shape
        self.tensor = Tensor(self.memory.ctypes.data + start, shape, dtype, self.memory)

    @classmethod
    def unwritten(cls, dtype: DType, shape: tuple[int, ...], shift: int) -> Placed:
        """Room for an output, poisoned as well."""
        nbytes = Tensor(0, shape, dtype).nbytes
        poison = 0xA5 if dtype.name.startswith("i") else 0xFF
        return cls(np.full(nbytes, poison, np.uint8), dtype, shape, shift)

    def values(self) -> np.ndarray:
        return decode(self.data.copy(), self.dtype.name, self.shape)

    def check_guards(self, name: str) -> None:
        """AssertionError if anything was written around the array."""
        for side, guard in (("before", self.memory[: self.start]), ("after", self.memory[self.end :])):
            assert (guard == self.poison).all(), f"{name}: memory {side} the array was written"

    def check_unchanged(self, name: str) -> None:
        assert np.array_equal(self.data, self.before), f"{name}: an input was written"
