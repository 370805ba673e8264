"""Writing GGUF files (version 3), tensor by tensor. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..quant.tensor_file import TensorFileWriter, Tensors, nbytes_of
from .kinds import GGUF_IDS

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def pair(key: str, value: Any) -> bytes:
    """A key-value pair: bool, int (u32), float (f32), str, or a list of str, int (i32) or float."""
    return _string(key) + _typed(value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<I", _ARRAY) + _array(value)


def _array(values: Sequence[Any]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    kind, dtype = (_F32, "<f4") if values and isinstance(values[0], float) else (_I32, "<i4")
    return struct.pack("<IQ", kind, len(values)) + np.array(values, dtype).tobytes()


class GgufWriter(TensorFileWriter):
    """Writes one .gguf file; it appears under its name when all tensors are there, and not at all otherwise.

    pairs: key-value pairs as bytes (`pair`, or copied from another file).
    """

    def __init__(self, path: Path, pairs: Sequence[bytes], tensors: Tensors) -> None:
        header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs)), *pairs]
        offset, nbytes = 0, nbytes_of(tensors)
        for name, (dtype, shape) in tensors.items():
            axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            header.append(_string(name) + axes + struct.pack("<IQ", GGUF_IDS[dtype.name], offset))
            offset += -(-nbytes[name] // ALIGNMENT) * ALIGNMENT
        super().__init__(path, b"".join(header), tensors, ALIGNMENT)
