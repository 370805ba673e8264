"""Writing safetensors files whose matrices are blocks: bytes under their usual names, their types in config.json.

A matrix [N, K] of type T is a U8 tensor [N, T.row_nbytes(K)]; config.json says
`"quantization_config": {"quant_method": "gllm", "version": 1, "tensors": {name: type}}`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..types import DType

_FLOAT_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def quantization_section(tensors: Mapping[str, DType]) -> dict[str, Any]:
    """What config.json must say for tensors of these types, floats among them."""
    types = {name: dtype.name for name, dtype in tensors.items() if dtype.is_quantized}
    return {"quant_method": "gllm", "version": 1, "tensors": types}


class NativeFileWriter:
    """Writes one .safetensors file tensor by tensor; it appears under its name when all are there.

    tensors: name → (type, shape in elements), in the order they are written. Leaving the context early, or with a
    tensor missing, leaves no file behind.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._expected = {n: int(np.prod(s[:-1])) * d.row_nbytes(s[-1]) for n, (d, s) in tensors.items()}
        self._left = list(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            type_name = _FLOAT_NAMES.get(dtype.name, "U8")
            stored = [*shape[:-1], dtype.row_nbytes(shape[-1])] if dtype.is_quantized else list(shape)
            end = offset + self._expected[name]
            header[name] = {"dtype": type_name, "shape": stored, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, data: np.ndarray) -> None:
        """The next tensor's bytes, in its stored form. ValueError for another name or size than announced."""
        if not self._left or self._left[0] != name:
            raise ValueError(f"{name} is not the next tensor; that is {self._left[0] if self._left else 'none'}")
        if data.nbytes != self._expected[name]:
            raise ValueError(f"{name} has {self._expected[name]} bytes, got {data.nbytes}")
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._left.pop(0)

    def __enter__(self) -> NativeFileWriter:
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
