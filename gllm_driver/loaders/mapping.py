"""Files as memory: a read-only mapping, and tensors that point into it once their bounds are checked."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ModelFormatError
from ..types import DType, Tensor

# The widest element access of a kernel per type: block types start with an f16 scale.
_ELEMENT_ALIGNMENT = {"f32": 4, "i32": 4, "i64": 8, "u8": 1}
_DEFAULT_ALIGNMENT = 2


class FileMapping:
    """A whole file mapped read-only. `data` is u8 [nbytes]; it, and every tensor made from it, keeps the mapping alive.

    Raises ModelFormatError when the file is missing, unreadable, empty or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                raise ModelFormatError("is a directory, expected a file", path=path)
            if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block for ever
                raise ModelFormatError("is not a regular file", path=path)
            with open(path, "rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes == 0:
                    raise ModelFormatError("the file is empty", path=path)
                mapping = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelFormatError("no such file", path=path) from None
        except PermissionError:
            raise ModelFormatError("no permission to read the file", path=path) from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or the file shrank before mmap
            raise ModelFormatError(f"cannot be opened: {error}", path=path) from error
        self.buffer = mapping
        self.data = np.frombuffer(mapping, dtype=np.uint8)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def will_need(self) -> None:
        """Ask the system to read the file ahead; a hint, so a system that cannot do it is no error."""
        if hasattr(mmap, "MADV_WILLNEED"):
            with contextlib.suppress(OSError):
                self.buffer.madvise(mmap.MADV_WILLNEED)

    def tensor(self, name: str, dtype: DType, shape: tuple[int, ...], offset: int) -> Tensor:
        """A tensor over `shape` elements that start at byte `offset` of the file.

        Nothing is copied, unless the file puts the elements at an address the type cannot be read from (safetensors
        allows that): then this one tensor is copied to aligned memory.

        Raises ModelFormatError when the bytes do not all lie in the file, an axis is empty, or rows hold no whole
        number of blocks.
        """
        if any(n < 1 for n in shape):
            raise ModelFormatError(f"shape {shape} has an empty axis", path=self.path, tensor=name)
        if shape and shape[-1] % dtype.block_size:
            raise ModelFormatError(
                f"rows of {shape[-1]} elements hold no whole number of {dtype.name} blocks of {dtype.block_size}",
                path=self.path,
                tensor=name,
            )
        nbytes = math.prod(shape) // dtype.block_size * dtype.block_nbytes
        if offset < 0 or nbytes > self.nbytes - offset:
            raise ModelFormatError(
                f"{dtype.name} {list(shape)} needs {nbytes} bytes but the file ends at byte {self.nbytes}; "
                "it is truncated or damaged, fetch it again",
                path=self.path,
                tensor=name,
                offset=offset,
            )
        view = self.data[offset : offset + nbytes]
        if view.ctypes.data % _ELEMENT_ALIGNMENT.get(dtype.name, _DEFAULT_ALIGNMENT):
            view = view.copy()
        return Tensor.from_numpy(view, dtype, shape)


def release(tensor: Tensor) -> None:
    """Give up the memory that a mapped tensor's pages take; they are read again when they are used again."""
    base = tensor.owner
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.address - np.frombuffer(base, np.uint8).ctypes.data
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):
        base.madvise(mmap.MADV_DONTNEED, first, start + tensor.nbytes - first)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file describes it, before anything is read: `type_name` is the file's word for the element
    type, `dtype` ours, or None when this version cannot read it. `shape` is in elements, row-major."""

    name: str
    type_name: str
    dtype: DType | None
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    file: FileMapping

    @property
    def path(self) -> Path:
        return self.file.path

    def open(self, readable: Iterable[str]) -> Tensor:
        """The tensor, memory-mapped. `readable` names the file's types this version can read, for the error."""
        if self.dtype is None:
            raise ModelFormatError(
                f"has type {self.type_name}, which this version cannot read (it reads {', '.join(readable)})",
                path=self.path,
                tensor=self.name,
            )
        return self.file.tensor(self.name, self.dtype, self.shape, self.offset)
