"""Device memory from a pool, pinned host memory, and their counters."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OutOfDeviceMemory
from .gate import call, cleanup, cu

if TYPE_CHECKING:
    from .device import Device


@dataclass(frozen=True)
class Allocations:
    """Counters of a device's memory."""

    num_driver_allocs: int  # calls of cuMemAlloc that succeeded, since the device was opened
    num_live: int  # buffers in use
    live_nbytes: int
    cached_nbytes: int  # freed, kept for the next request of the same size


class MemoryPool:
    """Device memory by exact size: the same sizes are asked for again and again, so nothing is rounded or split."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.RLock()  # re-entrant: the garbage collector may free a buffer inside alloc
        self._cached: dict[int, list[int]] = defaultdict(list)  # nbytes → addresses
        self._live: dict[int, int] = {}  # address → nbytes
        self._num_driver_allocs = 0
        self._closed = False

    def alloc(self, nbytes: int) -> int:
        """An address. Raises OutOfDeviceMemory, ValueError for a size below 1."""
        if nbytes < 1:
            raise ValueError(f"an allocation has at least 1 byte, got {nbytes}")
        with self._lock:
            cached = self._cached.get(nbytes)
            address = cached.pop() if cached else self._from_driver(nbytes)
            self._live[address] = nbytes
            return address

    def free(self, address: int) -> None:
        with self._lock:
            nbytes = self._live.pop(address, None)
            if nbytes is None or self._closed:
                return
            self._cached[nbytes].append(address)

    def trim(self) -> int:
        """Give cached memory back to the driver; how many bytes."""
        with self._lock:
            cached = [(nbytes, address) for nbytes, addresses in self._cached.items() for address in addresses]
            self._cached.clear()
        if cached:
            for _, address in cached:
                cleanup(cu.cuMemFree, address, context=self._device.context)
        return sum(nbytes for nbytes, _ in cached)

    def allocations(self) -> Allocations:
        with self._lock:
            cached = sum(nbytes * len(addresses) for nbytes, addresses in self._cached.items())
            return Allocations(self._num_driver_allocs, len(self._live), sum(self._live.values()), cached)

    def close(self) -> None:
        self.trim()
        self._closed = True

    def _from_driver(self, nbytes: int) -> int:
        with self._device:
            try:
                address = int(call(cu.cuMemAlloc, nbytes))
            except OutOfDeviceMemory:
                if not self.trim():
                    raise self._out_of_memory(nbytes) from None
                try:
                    address = int(call(cu.cuMemAlloc, nbytes))
                except OutOfDeviceMemory:
                    raise self._out_of_memory(nbytes) from None
        self._num_driver_allocs += 1
        return address

    def _out_of_memory(self, nbytes: int) -> OutOfDeviceMemory:
        free, total = self._device.mem_info()
        held = sum(self._live.values())
        explanation = (
            f"{size_text(nbytes)} asked for, {size_text(free)} of {size_text(total)} free, {size_text(held)} in this "
            "process's buffers; use a smaller model, context or batch, or stop other programs on the device"
        )
        return OutOfDeviceMemory(2, "CUDA_ERROR_OUT_OF_MEMORY", "cuMemAlloc", explanation)


class DeviceBuffer:
    """Device memory, freed by `free()` or when the last reference goes."""

    def __init__(self, pool: MemoryPool, nbytes: int) -> None:
        self.address = 0
        self._pool = pool
        self.address = pool.alloc(nbytes)
        self.nbytes = nbytes

    def free(self) -> None:
        """Give it back to the pool. Freeing again does nothing; `address` is 0 from now on."""
        address, self.address = self.address, 0
        if address:
            self._pool.free(address)

    def __del__(self) -> None:
        self.free()


class PinnedBuffer:
    """Page-locked host memory at `address`, which kernels can use as well (unified addressing).

    Freed by `free()` or with the device, not with its last reference: copies under way and views still use the memory.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.address = 0
        self._device = device
        if nbytes < 1:
            raise ValueError(f"an allocation has at least 1 byte, got {nbytes}")
        with device:
            self.address = int(call(cu.cuMemHostAlloc, nbytes, 0))
        self.nbytes = nbytes
        device.keep(self)

    def view(self, dtype: Any = np.uint8) -> np.ndarray:
        """The memory as a flat array; it must not be used after `free()`."""
        if not self.address:
            raise ValueError("this pinned buffer was freed")
        itemsize = np.dtype(dtype).itemsize
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))
        return memory[: self.nbytes // itemsize * itemsize].view(dtype)

    def free(self) -> None:
        """Unlock and free the memory. Freeing again does nothing."""
        address, self.address = self.address, 0
        if address:
            cleanup(cu.cuMemFreeHost, address, context=self._device.context)
            self._device.drop(self)

    close = free


def size_text(nbytes: int) -> str:
    """1536 → 1.5 kB."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
