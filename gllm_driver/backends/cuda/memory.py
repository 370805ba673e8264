"""Device memory: reservations that fail with advice, the workspace, small arrays with an image on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from math import prod

import numpy as np

from ...driver.device import Device
from ...driver.memory import DeviceBuffer, PinnedBuffer
from ...driver.stream import Event, Stream
from ...errors import CapacityError, DriverError, OutOfDeviceMemory
from ...types import DType, Tensor

ALIGNMENT = 256  # of every array: more than the widest load or bulk copy asks for

Field = tuple[str, tuple[int, ...], DType]


def reserve(device: Device, nbytes: int, what: str) -> DeviceBuffer:
    """Device memory for `what`. Raises CapacityError, with nothing taken, when there is not enough."""
    try:
        return device.alloc(max(nbytes, 1))
    except OutOfDeviceMemory as error:
        raise CapacityError(f"no room on {device.name} for {what}: {error.explanation}") from error


def free_nbytes(device: Device) -> int:
    """Bytes that could be reserved now, those the pool keeps for reuse included."""
    return device.mem_info()[0] + device.allocations().cached_nbytes


def aligned(nbytes: int) -> int:
    """`nbytes`, rounded up so that the next array starts aligned."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Workspace:
    """Named arrays that every step reuses. Growing one moves it: programs recorded before are then stale.

    A stale program that is still in use keeps the old memory alive, as the owner of its tensors; `moved` is called so
    that others are let go.
    """

    def __init__(self, device: Device, moved: Callable[[], None]) -> None:
        self._device = device
        self._moved = moved
        self._buffers: dict[str, DeviceBuffer] = {}
        self.generation = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        """The array of this name: one memory per name, whatever the shape. Raises CapacityError."""
        nbytes = prod(shape) * dtype.block_nbytes
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            grown = reserve(self._device, nbytes, f"the workspace array {name} {list(shape)}")
            is_moved = buffer is not None
            self._buffers[name] = buffer = grown
            if is_moved:
                self.generation += 1
                self._moved()
        return Tensor(buffer.address, shape, dtype, buffer)

    def clear(self) -> None:
        """Let go of all arrays."""
        self._buffers.clear()


class Mirror:
    """Small arrays that go to the device together: one device buffer, its pinned image on the host, one copy."""

    def __init__(self, device: Device, fields: Iterable[Field]) -> None:
        self._fields: dict[str, tuple[int, tuple[int, ...], DType]] = {}
        nbytes = 0
        for name, shape, dtype in fields:
            self._fields[name] = nbytes, shape, dtype
            nbytes += aligned(prod(shape) * dtype.block_nbytes)
        self._device = device
        self._buffer = reserve(device, nbytes, "the inputs of a step")
        self._pinned: PinnedBuffer = device.pinned(max(nbytes, 1))
        self._copied: Event = device.event()
        self._pending = False
        base = self._pinned.address
        self._host = {
            name: Tensor(base + offset, shape, dtype, self._pinned).to_numpy()
            for name, (offset, shape, dtype) in self._fields.items()
        }

    def tensor(self, name: str) -> Tensor:
        """The array on the device."""
        offset, shape, dtype = self._fields[name]
        return Tensor(self._buffer.address + offset, shape, dtype, self._buffer)

    def host(self) -> dict[str, np.ndarray]:
        """The arrays' image, to be written; waits for the copy under way. Needs the device's context."""
        if self._pending:
            self._copied.synchronize()
            self._pending = False
        return self._host

    def upload(self, stream: Stream) -> None:
        """Copy the image to the device, in the order of the stream. Needs the device's context."""
        self._device.copy_h2d(self._buffer.address, self._pinned.address, self._buffer.nbytes, stream)
        self._copied.record(stream)
        self._pending = True

    def upload_parts(self, name: str, parts: Iterable[tuple[int, int]], stream: Stream) -> None:
        """Copy only parts of one array: (first element, how many). Needs the device's context."""
        offset, _, dtype = self._fields[name]
        for first, count in parts:
            at, nbytes = offset + first * dtype.block_nbytes, count * dtype.block_nbytes
            self._device.copy_h2d(self._buffer.address + at, self._pinned.address + at, nbytes, stream)
        self._copied.record(stream)
        self._pending = True

    def close(self) -> None:
        """Free the image; device memory goes with the last tensor that uses it."""
        self._host = {}
        with contextlib.suppress(DriverError), self._device:  # an error of the work before it is its caller's to hear
            if self._pending:
                self._copied.synchronize()
        self._copied.close()
        self._pinned.free()
