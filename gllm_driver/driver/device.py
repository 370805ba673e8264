"""A device: its figures, its primary context, and everything made in it, all given back by `close()`."""

from __future__ import annotations

import threading
import uuid
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..errors import BackendUnavailableError, DriverError
from ..types import Traffic
from .gate import call, cleanup, cu, initialize
from .memory import Allocations, DeviceBuffer, MemoryPool, PinnedBuffer
from .stream import Event, Stream

if TYPE_CHECKING:
    from .module import Module

_ATTRIBUTE = cu.CUdevice_attribute


@dataclass(frozen=True)
class Properties:
    """What the driver says of a device."""

    index: int
    name: str
    uuid: uuid.UUID
    pci_bus_id: str
    cc: tuple[int, int]  # compute capability
    total_nbytes: int
    num_sms: int
    max_smem_optin: int  # bytes of shared memory a block may have after opting in
    l2_nbytes: int
    memory_bus_bits: int
    memory_clock_khz: int
    is_integrated: bool


def describe(index: int) -> Properties:
    """The figures of a device, without opening it. Raises DriverError."""

    def attribute(which: cu.CUdevice_attribute) -> int:
        return int(call(cu.cuDeviceGetAttribute, which, device))

    device = call(cu.cuDeviceGet, index)
    return Properties(
        index=index,
        name=call(cu.cuDeviceGetName, 256, device).split(b"\0")[0].decode(errors="replace").strip(),
        uuid=uuid.UUID(bytes=bytes(call(cu.cuDeviceGetUuid, device).bytes)),
        pci_bus_id=call(cu.cuDeviceGetPCIBusId, 64, device).split(b"\0")[0].decode(),
        cc=(
            attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        ),
        total_nbytes=int(call(cu.cuDeviceTotalMem, device)),
        num_sms=attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        max_smem_optin=attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        l2_nbytes=attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
        memory_bus_bits=attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH),
        memory_clock_khz=attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
        is_integrated=bool(attribute(_ATTRIBUTE.CU_DEVICE_ATTRIBUTE_INTEGRATED)),
    )


class Resource(Protocol):
    """Something made in a device's context that must be given back."""

    def close(self) -> None: ...


class Device:
    """An open device.

    Calls that wait for nothing (launches, copies on a stream, events) need the device's context on the calling thread:
    make them inside `with device:`, which nests and costs well under a microsecond. All others see to it themselves.
    """

    def __init__(self, index: int = 0) -> None:
        """Open device `index`. Raises BackendUnavailableError."""
        initialize()
        count = call(cu.cuDeviceGetCount)
        if not 0 <= index < count:
            there_are = f"there are {count}" if count > 1 else "there is one, number 0" if count else "there is none"
            raise BackendUnavailableError(f"cuda:{index}", f"no such device, {there_are}")
        self.properties = describe(index)
        self._handle = call(cu.cuDeviceGet, index)
        try:
            self.context = call(cu.cuDevicePrimaryCtxRetain, self._handle)
        except DriverError as error:  # others have it for themselves, or have left no memory
            raise BackendUnavailableError(f"cuda:{index}", error.explanation) from error
        self._closed = False
        self._lock = threading.Lock()
        self._h2d_nbytes = self._d2h_nbytes = 0
        self._resources: dict[int, Resource] = {}  # by id, in order of creation
        self._buffers: weakref.WeakSet[DeviceBuffer] = weakref.WeakSet()
        self._pool = MemoryPool(self)

    # ---- figures

    @property
    def index(self) -> int:
        return self.properties.index

    @property
    def name(self) -> str:
        return self.properties.name

    @property
    def uuid(self) -> uuid.UUID:
        return self.properties.uuid

    @property
    def cc(self) -> tuple[int, int]:
        """Compute capability."""
        return self.properties.cc

    @property
    def total_nbytes(self) -> int:
        return self.properties.total_nbytes

    # ---- the context on this thread

    def __enter__(self) -> Device:
        call(cu.cuCtxPushCurrent, self.context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cleanup(cu.cuCtxPopCurrent)

    def synchronize(self) -> None:
        """Wait for everything issued to the device. Raises ContextLost if any of it failed."""
        with self:
            call(cu.cuCtxSynchronize)

    # ---- memory

    def alloc(self, nbytes: int) -> DeviceBuffer:
        """Device memory, 256-byte aligned, contents undefined. Raises OutOfDeviceMemory with the figures.

        Freed buffers are kept for the next request of the same size. The order of work on one stream is what keeps a
        buffer's last use before its next: wait before freeing what another stream still uses.
        """
        buffer = DeviceBuffer(self._pool, nbytes)
        self._buffers.add(buffer)
        return buffer

    def pinned(self, nbytes: int) -> PinnedBuffer:
        """Host memory the device can copy to and from at full speed, and kernels can address."""
        return PinnedBuffer(self, nbytes)

    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes of the device, all programs counted."""
        with self:
            free, total = call(cu.cuMemGetInfo)
        return int(free), int(total)

    def allocations(self) -> Allocations:
        """Counters of device memory."""
        return self._pool.allocations()

    def trim(self) -> int:
        """Give cached buffers back to the driver; how many bytes that were."""
        return self._pool.trim()

    def traffic(self) -> Traffic:
        """Bytes copied between host and device so far, by calls and by graph launches."""
        return Traffic(self._h2d_nbytes, self._d2h_nbytes)

    def count_traffic(self, h2d_nbytes: int = 0, d2h_nbytes: int = 0) -> None:
        """Add bytes that no copy of this package moved: what kernels read from or write to pinned memory themselves."""
        with self._lock:
            self._h2d_nbytes += h2d_nbytes
            self._d2h_nbytes += d2h_nbytes

    def copy_h2d(self, dst: int, src: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copy host memory at `src` to device memory at `dst`; without a stream, return when it is done.

        On a stream the source must stay as it is until the stream has passed the copy, if it is pinned.
        """
        if stream is None:
            with self:
                call(cu.cuMemcpyHtoD, dst, src, nbytes)
                # The driver returns once pageable memory is staged, and our streams do not wait for the null stream.
                call(cu.cuCtxSynchronize)
        else:
            call(cu.cuMemcpyHtoDAsync, dst, src, nbytes, stream.handle)
        self._count(stream, nbytes, 0)

    def copy_d2h(self, dst: int, src: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copy device memory at `src` to host memory at `dst`; without a stream, return when it is done."""
        if stream is None:
            with self:
                call(cu.cuMemcpyDtoH, dst, src, nbytes)
        else:
            call(cu.cuMemcpyDtoHAsync, dst, src, nbytes, stream.handle)
        self._count(stream, 0, nbytes)

    def copy_d2d(self, dst: int, src: int, nbytes: int, stream: Stream | None = None) -> None:
        """Copy within the device; without a stream, return when it is done."""
        if stream is not None:
            call(cu.cuMemcpyDtoDAsync, dst, src, nbytes, stream.handle)
            return
        with self:
            call(cu.cuMemcpyDtoD, dst, src, nbytes)
            call(cu.cuCtxSynchronize)  # the driver does not wait for copies within the device

    def fill(self, dst: int, value: int, nbytes: int, stream: Stream) -> None:
        """Set every byte of device memory to `value`."""
        call(cu.cuMemsetD8Async, dst, value, nbytes, stream.handle)

    def _count(self, stream: Stream | None, h2d_nbytes: int, d2h_nbytes: int) -> None:
        if stream is not None and stream.captured is not None:
            stream.captured.add(h2d_nbytes, d2h_nbytes)  # counted at each launch of the graph instead
        else:
            self.count_traffic(h2d_nbytes, d2h_nbytes)

    # ---- objects

    def stream(self, priority: int = 0) -> Stream:
        """A stream that does not wait for the null stream; a lower number is a higher priority."""
        return Stream(self, priority)

    def event(self, timing: bool = False) -> Event:
        """An event; `timing` makes it usable for `elapsed_ms`, at some cost."""
        return Event(self, timing)

    def load(self, image: bytes, name: str = "module") -> Module:
        """Load a cubin. Raises CubinError for anything else, NoKernelImage for another architecture's."""
        from .module import Module

        return Module(self, image, name)

    def keep(self, resource: Resource) -> None:
        """Close `resource` with the device, unless it is dropped before."""
        self._resources[id(resource)] = resource

    def drop(self, resource: Resource) -> None:
        """`resource` has been closed."""
        self._resources.pop(id(resource), None)

    def close(self) -> None:
        """Give everything back: what was made here is unusable afterwards. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        cleanup(cu.cuCtxSynchronize, context=self.context)
        for resource in reversed(list(self._resources.values())):
            resource.close()
        for buffer in list(self._buffers):
            buffer.free()
        self._pool.close()
        cleanup(cu.cuDevicePrimaryCtxRelease, self._handle)

    @property
    def is_closed(self) -> bool:
        return self._closed
