"""Writing GGUF files (version 3), tensor by tensor. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..types import DType
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


class GgufWriter:
    """Writes one .gguf file; it appears under its name when all tensors are there, and not at all otherwise.

    pairs: key-value pairs as bytes (`pair`, or copied from another file). tensors: name → (type, shape in elements,
    row-major), in the order they are written.
    """

    def __init__(
        self, path: Path, pairs: Sequence[bytes], tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    ) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._expected = {n: int(np.prod(s[:-1])) * d.row_nbytes(s[-1]) for n, (d, s) in tensors.items()}
        self._left = list(tensors)
        header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(pairs)), *pairs]
        offset = 0
        for name, (dtype, shape) in tensors.items():
            axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            header.append(_string(name) + axes + struct.pack("<IQ", GGUF_IDS[dtype.name], offset))
            offset += _padded(self._expected[name])
        self._header = b"".join(header)
        self._file: Any = None

    def write(self, name: str, data: np.ndarray) -> None:
        """The next tensor's bytes, in its stored form. ValueError for another name or size than announced."""
        if not self._left or self._left[0] != name:
            raise ValueError(f"{name} is not the next tensor; that is {self._left[0] if self._left else 'none'}")
        if data.nbytes != self._expected[name]:
            raise ValueError(f"{name} has {self._expected[name]} bytes, got {data.nbytes}")
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._file.write(b"\0" * (_padded(data.nbytes) - data.nbytes))
        self._left.pop(0)

    def __enter__(self) -> GgufWriter:
        self._file = open(self._temporary, "wb")
        try:
            self._file.write(self._header + b"\0" * (_padded(len(self._header)) - len(self._header)))
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._left:
                    raise ValueError(f"{len(self._left)} tensors were not written, the first is {self._left[0]}")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._temporary.replace(self._path)
        finally:
            try:
                self._file.close()  # on a full disk this fails as well: it writes what is buffered
            finally:
                self._temporary.unlink(missing_ok=True)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
