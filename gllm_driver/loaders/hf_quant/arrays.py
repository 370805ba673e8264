"""Arrays out of safetensors files, and integers packed into 32-bit words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...errors import ModelFormatError
from ..mapping import StoredTensor

_NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "u1"}


def array(tensor: StoredTensor) -> np.ndarray:
    """The tensor's values in its shape; a view of the file. ModelFormatError for types that have no numpy type."""
    if tensor.type_name == "BF16":
        import ml_dtypes

        dtype = np.dtype(ml_dtypes.bfloat16)
    elif tensor.type_name in _NUMPY:
        dtype = np.dtype(_NUMPY[tensor.type_name])
    else:
        raise ModelFormatError(f"has the unexpected type {tensor.type_name}", path=tensor.path, tensor=tensor.name)
    nbytes = math.prod(tensor.shape) * dtype.itemsize
    raw = np.frombuffer(tensor.file.buffer, np.uint8, nbytes, tensor.offset)
    if tensor.offset % dtype.itemsize:
        raw = raw.copy()
    return raw.view(dtype).reshape(tensor.shape)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """i32 [..., n] → u8 [..., n · 32 / bits]: fields of 2, 3, 4 or 8 bits from the lowest up, across words for 3."""
    words = np.ascontiguousarray(words).view(np.uint32)
    if bits == 3:
        stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        fields = stream.reshape(*words.shape[:-1], -1, 3)
        return fields[..., 0] | fields[..., 1] << np.uint8(1) | fields[..., 2] << np.uint8(2)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.astype(np.uint8).reshape(*words.shape[:-1], -1)


@dataclass(frozen=True)
class Parts:
    """The tensors of one quantized matrix, `name`.weight and its kin, and what is said when they do not fit."""

    name: str
    tensors: Mapping[str, StoredTensor]  # by the last part of their names

    def fail(self, problem: str, part: str | None = None) -> ModelFormatError:
        tensor = self.tensors.get(part or "") or next(iter(self.tensors.values()))
        return ModelFormatError(problem, path=tensor.path, tensor=f"{self.name}.{part}" if part else tensor.name)

    def shape(self, part: str) -> tuple[int, ...]:
        if part not in self.tensors:
            raise self.fail("is missing, the layer is quantized and needs it", part)
        return self.tensors[part].shape

    def get(self, part: str, shape: tuple[int, ...], types: tuple[str, ...]) -> np.ndarray:
        """The array of a part; ModelFormatError when it is missing or has another shape or type."""
        if self.shape(part) != shape:
            raise self.fail(f"has shape {list(self.shape(part))}, expected {list(shape)} beside the others", part)
        if self.tensors[part].type_name not in types:
            raise self.fail(f"has type {self.tensors[part].type_name}, expected {' or '.join(types)}", part)
        return array(self.tensors[part])

    def scales(self, part: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float part as f32; ModelFormatError when it holds NaN or infinities."""
        found = self.get(part, shape, ("F16", "BF16", "F32")).astype(np.float32)
        if not np.isfinite(found).all():
            raise self.fail("has a NaN or infinite scale: the file is damaged or was written wrongly", part)
        return found
