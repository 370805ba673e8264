"""Weights to the device: checked, converted where asked, through pinned staging memory.

Worker threads fill staging buffers while earlier ones are copied, so that the bus, not a processor, sets the pace.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import numpy as np

from ...driver.device import Device
from ...driver.memory import size_text
from ...driver.stream import Stream
from ...errors import CapacityError, ModelFormatError
from ...types import DTYPES, F32, FLOAT_DTYPES, DType, Tensor
from ..base import ModelWeights
from .memory import aligned, free_nbytes, reserve

STAGE_NBYTES = 8 << 20
MAX_WORKERS = 8
PASS_ELEMENTS = 1 << 17  # checked right after they were copied, while the cache holds them

# Exponent bits of a word; a value whose exponent bits are all ones is NaN or infinite (IEEE 754). Blocks have a f16
# scale in front, and that is all of them that can be.
_WORDS: Mapping[str, tuple[type, int, int]] = {  # dtype: word, mask, words per block
    "f32": (np.uint32, 0x7F80_0000, 1),
    "f16": (np.uint16, 0x7C00, 1),
    "bf16": (np.uint16, 0x7F80, 1),
    "q8_0": (np.uint16, 0x7C00, 17),
    "q4_0": (np.uint16, 0x7C00, 9),
}


@dataclass(frozen=True)
class _Item:
    """One tensor of the file and its place on the device; several slots may share it."""

    tensor: Tensor
    dtype: DType  # on the device
    offset: int
    source: str  # name in the file


@dataclass(frozen=True)
class _Piece:
    """What one staging buffer holds: `count` elements of an item."""

    item: _Item
    start: int
    count: int

    @property
    def nbytes(self) -> int:
        return _nbytes(self.item.dtype, self.count)


def upload(
    device: Device, stream: Stream, model: ModelWeights, dtype: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, Tensor], int]:
    """Every tensor and constant on the device by slot, and their bytes; `progress(done, total)` counts bytes.

    Raises CapacityError before anything is copied when they do not fit, ModelFormatError for NaN or infinite values.
    """
    items: dict[tuple[int, tuple[int, ...], str], _Item] = {}
    slots: dict[str, _Item] = {}
    total = 0
    for slot, tensor in {**model.tensors, **model.constants}.items():
        key = tensor.address, tensor.shape, tensor.dtype.name
        if key not in items:
            wanted = tensor.dtype if slot in model.constants else device_dtype(tensor, dtype)
            items[key] = _Item(tensor, wanted, total, model.sources.get(slot, slot))
            total += aligned(_nbytes(wanted, prod(tensor.shape)))
        slots[slot] = items[key]
    free = free_nbytes(device)
    if total > free:
        raise CapacityError(
            f"the weights need {size_text(total)}, {device.name} has {size_text(free)} free of "
            f"{size_text(device.total_nbytes)}: use a smaller or quantized model, or the CPU"
        )
    slab = reserve(device, total, "the weights")
    pieces = [piece for item in items.values() for piece in _pieces(item)]
    with device:
        _copy_all(device, stream, slab.address, pieces, model.path, lambda done: progress(done, total))
    placed = {s: Tensor(slab.address + i.offset, i.tensor.shape, i.dtype, slab) for s, i in slots.items()}
    return placed, total


def device_dtype(tensor: Tensor, dtype: str) -> DType:
    """Vectors in f32, float matrices in `dtype` (auto: as stored), blocks as they are."""
    if len(tensor.shape) == 1:
        return F32
    if dtype != "auto" and tensor.dtype.name in FLOAT_DTYPES:
        return DTYPES[dtype]
    return tensor.dtype


def _copy_all(
    device: Device,
    stream: Stream,
    address: int,
    pieces: list[_Piece],
    path: str,
    progress: Callable[[int], None],
) -> None:
    """Fill and copy `pieces` in order; returns when all are on the device."""
    workers = min(MAX_WORKERS, os.cpu_count() or 1, len(pieces))
    count = min(2 * workers, len(pieces))  # half of the buffers are being filled while the others are being copied
    stage_nbytes = max(piece.nbytes for piece in pieces)
    pinned = [device.pinned(stage_nbytes) for _ in range(count)]
    events = [device.event() for _ in range(count)]
    futures: list[Future[int]] = []
    done = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for i in range(len(pieces) + workers):
            if i >= workers:
                j = i - workers
                piece, stage = pieces[j], j % count
                bad = futures[j].result()
                if bad >= 0:
                    raise ModelFormatError(
                        f"has a NaN or infinite value at element {piece.start + bad}: the file is damaged or was "
                        "written wrongly",
                        path=path,
                        tensor=piece.item.source,
                    )
                offset = piece.item.offset + _nbytes(piece.item.dtype, piece.start)
                device.copy_h2d(address + offset, pinned[stage].address, piece.nbytes, stream)
                events[stage].record(stream)
                done += piece.nbytes
                progress(done)
            if i < len(pieces):
                if i >= count:
                    events[i % count].synchronize()
                futures.append(pool.submit(_fill, pieces[i], pinned[i % count].address))
        stream.synchronize()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for event in events:
            event.close()
        for buffer in pinned:
            buffer.free()


def _pieces(item: _Item) -> Iterator[_Piece]:
    total, block = prod(item.tensor.shape), item.tensor.dtype.block_size
    count = STAGE_NBYTES // item.dtype.block_nbytes * item.dtype.block_size
    count -= count % block
    for start in range(0, total, count):
        yield _Piece(item, start, min(count, total - start))


def _fill(piece: _Piece, address: int) -> int:
    """Put a piece into staging memory in the device's dtype: its first element that is no number, or −1."""
    source, target = piece.item.tensor.dtype, piece.item.dtype
    begin = piece.item.tensor.address + _nbytes(source, piece.start)
    for start in range(0, piece.count, PASS_ELEMENTS):
        count = min(PASS_ELEMENTS, piece.count - start)
        raw = _bytes_at(begin + _nbytes(source, start), _nbytes(source, count))
        out = _bytes_at(address + _nbytes(target, start), _nbytes(target, count))
        if source is target:
            out[:] = raw
            raw = out
        else:
            with np.errstate(over="ignore"):  # a weight too large for f16 shows in the logits, as on the CPU
                out.view(_numpy_type(target))[:] = raw.view(_numpy_type(source))
        bad = first_not_finite(raw, source.name)
        if bad >= 0:
            return start + bad
    return -1


def first_not_finite(raw: np.ndarray, dtype: str) -> int:
    """Index of the first element (of a block) that is NaN or infinite in u8 memory of `dtype`, or −1."""
    if dtype not in _WORDS:
        return -1
    word, mask, stride = _WORDS[dtype]
    exponents = raw.view(word)[::stride] & word(mask)
    if exponents.max() != mask:
        return -1
    return int(np.argmax(exponents == mask)) * DTYPES[dtype].block_size


def _bytes_at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _nbytes(dtype: DType, count: int) -> int:
    return count // dtype.block_size * dtype.block_nbytes


def _numpy_type(dtype: DType) -> np.dtype:
    if dtype.name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"f32": np.float32, "f16": np.float16}[dtype.name])
