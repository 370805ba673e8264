"""Files of tensors, written one tensor after another: whole, or not there at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import DType

if TYPE_CHECKING:
    from typing_extensions import Self

Tensors = Mapping[str, tuple[DType, tuple[int, ...]]]
"""name → (type, shape in elements, row-major), in the order they are written."""


def nbytes_of(tensors: Tensors) -> dict[str, int]:
    """What each takes in its stored form."""
    return {name: int(np.prod(shape[:-1])) * dtype.row_nbytes(shape[-1]) for name, (dtype, shape) in tensors.items()}


class TensorFileWriter:
    """A context that writes `header`, then tensors by `write`, each padded to `alignment` bytes, under another name.

    The file gets its name when the context is left with all tensors written; otherwise nothing is left behind.
    """

    def __init__(self, path: Path, header: bytes, tensors: Tensors, alignment: int = 1) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._header = header
        self._expected = nbytes_of(tensors)
        self._left = list(tensors)
        self._alignment = alignment
        self._file: Any = None

    def write(self, name: str, data: np.ndarray) -> None:
        """The next tensor's bytes, in its stored form. ValueError for another name or size than announced."""
        if not self._left or self._left[0] != name:
            raise ValueError(f"{name} is not the next tensor; that is {self._left[0] if self._left else 'none'}")
        if data.nbytes != self._expected[name]:
            raise ValueError(f"{name} has {self._expected[name]} bytes, got {data.nbytes}")
        self._put(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        self._left.pop(0)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._file.write(b"\0" * (-len(data) % self._alignment))

    def __enter__(self) -> Self:
        self._file = open(self._temporary, "wb")
        try:
            self._put(self._header)
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
