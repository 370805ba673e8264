"""Weights for the CPU backend: mapped files are used where they lie, checked once, converted only when asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gllm_driver.errors import ModelFormatError
from gllm_driver.types import DTYPES, F32, FLOAT_DTYPES, DType, Tensor

from .compile import Library
from .kernels import convert_entry, first_bad_entry
from .team import aligned

CHUNK_ELEMENTS = 1 << 22  # a thread's share of a pass, a multiple of every block size
CONVERT_SCRATCH = 4 * 4096

_I64 = ctypes.c_int64


class Uploader:
    """Checks and converts tensors with `num_threads` threads; `progress(done_bytes)` hears after each piece."""

    def __init__(self, library: Library, num_threads: int) -> None:
        self._library = library
        self._pool = ThreadPoolExecutor(num_threads)

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def check_finite(
        self, tensors: Mapping[str, Tensor], sources: Mapping[str, str], path: str, progress: Callable[[int], None]
    ) -> None:
        """Raise ModelFormatError naming the first tensor that holds NaN or infinity. Reads every byte once."""
        names = sorted({t.dtype.name for t in tensors.values()})
        addresses = self._library.load([first_bad_entry(n) for n in names])
        functions = {n: ctypes.CFUNCTYPE(_I64, _I64, _I64)(addresses[first_bad_entry(n).name]) for n in names}
        pieces = [(slot, *piece) for slot, tensor in tensors.items() for piece in _pieces(tensor)]

        def check(piece: tuple[str, int, int, int]) -> tuple[str, int, int]:
            slot, address, start, count = piece
            bad = functions[tensors[slot].dtype.name](address, count)
            return slot, -1 if bad < 0 else start + bad, count

        done = 0
        for slot, bad, count in self._pool.map(check, pieces):
            if bad >= 0:
                raise ModelFormatError(
                    f"has a NaN or infinite value at element {bad}: the file is damaged or was written wrongly",
                    path=path,
                    tensor=sources.get(slot, slot),
                )
            done += count * tensors[slot].dtype.block_nbytes // tensors[slot].dtype.block_size
            progress(done)

    def convert(self, tensor: Tensor, dtype: DType) -> Tensor:
        """A copy of a float tensor in another float type."""
        entry = convert_entry(tensor.dtype.name)
        function = ctypes.CFUNCTYPE(_I64, *[_I64] * 5)(self._library.load([entry])[entry.name])
        out = aligned(tensor.num_rows * dtype.row_nbytes(tensor.shape[-1]))

        def piece(part: tuple[int, int, int]) -> None:
            address, start, count = part
            scratch = aligned(CONVERT_SCRATCH)
            function(address, count, out.ctypes.data + start * dtype.block_nbytes, dtype.code, scratch.ctypes.data)

        for _ in self._pool.map(piece, _pieces(tensor)):
            pass
        return Tensor(out.ctypes.data, tensor.shape, dtype, out)


def _pieces(tensor: Tensor) -> list[tuple[int, int, int]]:
    """(address, first element, number of elements) of pieces of at most CHUNK_ELEMENTS."""
    total = int(np.prod(tensor.shape))
    dtype = tensor.dtype
    return [
        (tensor.address + start // dtype.block_size * dtype.block_nbytes, start, min(CHUNK_ELEMENTS, total - start))
        for start in range(0, total, CHUNK_ELEMENTS)
    ]


def placed(tensor: Tensor, dtype: str, uploader: Uploader) -> Tensor:
    """The tensor as kernels want it: vectors in f32, float matrices in `dtype` (auto: as stored), blocks as they are.

    Kernels read whole elements at any address, so a mapped tensor needs no particular alignment.
    """
    wanted = tensor.dtype
    if len(tensor.shape) == 1:
        wanted = F32
    elif dtype != "auto" and tensor.dtype.name in FLOAT_DTYPES:
        wanted = DTYPES[dtype]
    return tensor if wanted is tensor.dtype else uploader.convert(tensor, wanted)
