"""Weights to the device: raw bytes over the bus, where they are checked, converted and packed (op pack_weight).

Float tensors that keep their type go straight to their place and are checked there. All others go through a small
staging region: floats of one type to another, one tensor after the other as if they were one; blocks to the packed type
of their format, some rows at a time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from ...driver.memory import DeviceBuffer, size_text
from ...errors import CapacityError, ModelFormatError
from ...packed_types import packed_dtype
from ...types import DTYPES, F32, FLOAT_DTYPES, I32, DType, Tensor
from ..base import ModelWeights
from .memory import aligned, free_nbytes, reserve
from .runtime import Runtime
from .transfer import Job, Span, Transfer, Window, windows

JOB_NBYTES = 32 << 20  # of what is staged at a time
DIRECT_JOB_NBYTES = 128 << 20  # of what is checked in its place at a time
NUM_STAGES = 2  # one is converted while the next is filled
FLAT = 1 << 14  # elements of a row of float tensors that are taken as one
GRAIN = 128  # elements: where a float tensor may begin among others of its type


@dataclass(frozen=True)
class Item:
    """One tensor of the file and its place on the device; several slots may share it."""

    tensor: Tensor
    dtype: DType  # on the device
    source: str  # name in the file

    @property
    def size(self) -> int:
        return prod(self.tensor.shape)


@dataclass
class Group:
    """Items that lie one after another, in the file's types as on the device, and are treated as rows of K elements.

    Floats of a type are one flat group; blocks are a group for each tensor, with its own rows.
    """

    source: DType
    target: DType
    K: int  # elements of a row; 0: neither checked nor converted
    items: list[Item] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of each item, in elements
    size: int = 0  # elements
    offset: int = 0  # in the slab

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.starts.append(self.size)
        self.size += item.size if self.source.is_quantized else -(-item.size // GRAIN) * GRAIN

    @property
    def is_direct(self) -> bool:
        """Its bytes on the device are those of the file."""
        return self.source is self.target

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.nbytes_of(self.target, self.size)

    def nbytes_of(self, dtype: DType, size: int) -> int:
        """Bytes of the first `size` elements in a type; whole rows, unless the group is flat."""
        return size // self.K * dtype.row_nbytes(self.K) if dtype.is_quantized else size * dtype.block_nbytes

    def spans(self) -> Iterator[Span]:
        for item, start in zip(self.items, self.starts, strict=True):
            yield Span(item.tensor.address, self.nbytes_of(self.source, start), item.tensor.nbytes)

    @property
    def job_nbytes(self) -> int:
        """Bytes of a job, in the source's type: whole rows of blocks."""
        if not self.source.is_quantized:
            return DIRECT_JOB_NBYTES if self.is_direct else JOB_NBYTES
        rows = JOB_NBYTES // max(self.source.row_nbytes(self.K), self.target.row_nbytes(self.K))
        return max(rows, 1) * self.source.row_nbytes(self.K)


@dataclass(frozen=True)
class _Part:
    """What one job brings: elements start … start + size − 1 of a group."""

    group: Group
    window: Window
    start: int
    size: int

    def calls(self) -> Iterator[tuple[int, int, int]]:
        """(first element, rows, elements of a row) of the pack_weight calls that cover it."""
        K = self.group.K
        rows, rest = divmod(self.size, K) if K else (0, 0)
        if rows:
            yield self.start, rows, K
        if rest:
            yield self.start + rows * K, 1, rest


def upload(
    runtime: Runtime, model: ModelWeights, dtype: str, progress: Callable[[int, int], None]
) -> tuple[dict[str, Tensor], int]:
    """Every tensor and constant on the device by slot, and their bytes; `progress(done, total)` counts bytes.

    Raises CapacityError before anything is copied when they do not fit, ModelFormatError for NaN or infinite values.
    """
    slots, groups = _plan(model, dtype)
    device, total = runtime.device, 0
    for group in groups:
        group.offset = total
        total += aligned(group.nbytes)
    parts = [part for group in groups for part in _parts(group)]
    staged = max((part.window.nbytes for part in parts if not part.group.is_direct), default=0)
    num_rows = sum(rows for part in parts for _, rows, _ in part.calls())
    needed, free = total + NUM_STAGES * aligned(staged) + 4 * num_rows, free_nbytes(device)
    if needed > free:
        raise CapacityError(
            f"the weights need {size_text(needed)}, {device.name} has {size_text(free)} free of "
            f"{size_text(device.total_nbytes)}: use a smaller or quantized model, or the CPU"
        )
    slab = reserve(device, total, "the weights")
    try:
        bad = _copy(runtime, slab, parts, staged, num_rows, lambda done: progress(min(done, total), total))
        _raise_if_bad(bad, parts, model.path)
    except BaseException:
        slab.free()  # the error may be looked at for long
        raise
    placed: dict[str, Tensor] = {}
    for slot, (group, index) in slots.items():
        item = group.items[index]
        at = slab.address + group.offset + group.nbytes_of(group.target, group.starts[index])
        placed[slot] = Tensor(at, item.tensor.shape, item.dtype, slab)
    return placed, total


def device_dtype(tensor: Tensor, dtype: str) -> DType:
    """Vectors in f32, float matrices in `dtype` (auto: as stored), blocks in the packed type of their format."""
    if len(tensor.shape) == 1:
        return F32
    if dtype != "auto" and tensor.dtype.name in FLOAT_DTYPES:
        return DTYPES[dtype]
    return packed_dtype(tensor.dtype.name) or tensor.dtype


def _plan(model: ModelWeights, dtype: str) -> tuple[dict[str, tuple[Group, int]], list[Group]]:
    """(group, number within it) of every slot, and the groups."""
    slots: dict[str, tuple[Group, int]] = {}
    places: dict[tuple[int, tuple[int, ...], str], tuple[Group, int]] = {}
    flat: dict[tuple[str, str], Group] = {}
    groups: list[Group] = []
    for slot, tensor in {**model.tensors, **model.constants}.items():
        key = tensor.address, tensor.shape, tensor.dtype.name
        if key not in places:
            target = tensor.dtype if slot in model.constants else device_dtype(tensor, dtype)
            item = Item(tensor, target, model.sources.get(slot, slot))
            kind = tensor.dtype.name, target.name
            if tensor.dtype.is_quantized:
                group = Group(tensor.dtype, target, tensor.shape[-1])
            else:
                group = flat.get(kind) or Group(tensor.dtype, target, FLAT if target.name in FLOAT_DTYPES else 0)
                flat[kind] = group
            if not group.items:
                groups.append(group)
            group.add(item)
            places[key] = group, len(group.items) - 1
        slots[slot] = places[key]
    return slots, groups


def _parts(group: Group) -> Iterator[_Part]:
    for window in windows(group.spans(), group.nbytes_of(group.source, group.size), group.job_nbytes):
        if group.source.is_quantized:
            row = group.source.row_nbytes(group.K)
            start, size = window.start // row * group.K, window.nbytes // row * group.K
        else:
            start, size = (n // group.source.block_nbytes for n in (window.start, window.nbytes))
        yield _Part(group, window, start, size)


def _copy(
    runtime: Runtime,
    slab: DeviceBuffer,
    parts: Sequence[_Part],
    staged_nbytes: int,
    num_rows: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Everything in its place; what pack_weight found in each row: i32 [num_rows]."""
    device, stream = runtime.device, runtime.stream
    stages = [reserve(device, staged_nbytes, "staged weights") for _ in range(NUM_STAGES)]
    found = reserve(device, 4 * num_rows, "the check of the weights")
    jobs: list[Job] = []
    gates: list[threading.Event] = []
    for part in parts:
        if part.group.is_direct:
            jobs.append(Job(slab.address + part.group.offset + part.window.start, part.window))
        else:
            gate = threading.Event()
            jobs.append(Job(stages[len(gates) % NUM_STAGES].address, part.window, gate))
            gates.append(gate)
    for gate in gates[:NUM_STAGES]:
        gate.set()
    row = done = used = 0
    free = device.event()
    try:
        with device:
            stream.synchronize()  # memory of the pool may still be in use there, and copies go to another stream
            with Transfer(device, jobs) as transfer:
                for index, (part, job) in enumerate(zip(parts, jobs, strict=True)):
                    transfer.wait_issued(index, stream)
                    row = _convert(runtime, part, job.address, slab, found, row)
                    if job.gate is not None:
                        used += 1
                        if len(gates) >= used + NUM_STAGES:  # somebody waits for the stage that is free after this
                            free.record(stream)
                            transfer.open_gate(gates[used + NUM_STAGES - 1], free)
                    done += part.group.nbytes_of(part.group.target, part.size)
                    progress(done)
                stream.synchronize()
            bad = np.empty(num_rows, np.int32)
            if num_rows:
                device.copy_d2h(bad.ctypes.data, found.address, bad.nbytes)
            return bad
    finally:
        free.close()
        for buffer in (*stages, found):
            buffer.free()
        device.trim()


def _convert(
    runtime: Runtime,
    part: _Part,
    raw: int,
    slab: DeviceBuffer,
    found: DeviceBuffer,
    row: int,
) -> int:
    """Queue the pack_weight calls of a part whose bytes are at `raw`; the number of the next free row of `found`."""
    group, program = part.group, runtime.program()
    for start, rows, K in part.calls():
        source = raw + group.nbytes_of(group.source, start - part.start)
        target = slab.address + group.offset + group.nbytes_of(group.target, start)
        program.add(
            "pack_weight",
            {
                "raw": Tensor(source, (rows, K), group.source),
                "out": Tensor(target, (rows, K), group.target, slab),
                "bad": Tensor(found.address + 4 * row, (rows,), I32, found),
            },
        )
        row += rows
    program.finish().issue()
    return row


def _raise_if_bad(bad: np.ndarray, parts: Sequence[_Part], path: str) -> None:
    """Name the first element that is no number."""
    rows = np.flatnonzero(bad >= 0)
    if not len(rows):
        return
    row = 0
    for part in parts:
        for start, count, K in part.calls():
            if rows[0] < row + count:
                element = start + (int(rows[0]) - row) * K + int(bad[rows[0]])
                index = bisect_right(part.group.starts, element) - 1
                raise ModelFormatError(
                    f"has a NaN or infinite value at element {element - part.group.starts[index]}: the file is damaged "
                    "or was written wrongly",
                    path=path,
                    tensor=part.group.items[index].source,
                )
            row += count
