"""KV pages in pinned buffers of the host: copies on a stream of their own, that no step waits for without need."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ...driver.stream import Event
from ..base import KvCacheHandle, StageBuffer
from .runtime import Runtime
from .swap import SwapSpace


class CudaBuffer:
    """Slots of a stage, and the mark behind the last copy that uses them."""

    def __init__(self, stage: CudaStage, index: int) -> None:
        self.index = index
        self._stage = stage
        self.data = stage.rows(index)

    def wait(self) -> None:
        self._stage.wait(self.index)

    def __del__(self) -> None:
        self._stage.give_back(self.index)


class CudaStage:
    """The buffers of one cache. Their slots are those of a swap space, whose copies reach the speed of the bus."""

    def __init__(
        self,
        runtime: Runtime,
        kv: KvCacheHandle,
        num_pages: int,
        num_buffers: int,
        spaces: list[SwapSpace] | None = None,
    ) -> None:
        """`spaces`: those of the cache. Raises CapacityError when the host cannot pin so much memory."""
        self._device = runtime.device
        self._num_pages = num_pages
        self.space = SwapSpace(runtime, kv, num_pages * num_buffers, spaces)
        self._slots = self.space.slots().reshape(num_buffers, num_pages, -1)
        self._marks: list[Event] = [self._device.event() for _ in range(num_buffers)]
        self._free = deque(range(num_buffers))  # of some, copies may still be under way: they were issued and let go
        self._is_closed = False

    def rows(self, index: int) -> np.ndarray:
        """A buffer's memory, u8 [num_pages, page_nbytes]."""
        return self._slots[index]

    def take(self) -> CudaBuffer | None:
        with self._device:
            for _ in range(len(self._free)):
                try:
                    index = self._free.popleft()
                except IndexError:  # another thread was quicker
                    return None
                if self._marks[index].is_done():
                    return CudaBuffer(self, index)
                self._free.append(index)
        return None

    def hold(self, rows: np.ndarray) -> CudaBuffer | None:
        buffer = self.take()
        if buffer is not None:
            buffer.data[: len(rows)] = rows
        return buffer

    def to_host(self, pages: Sequence[int], buffer: StageBuffer) -> None:
        self.space.swap_out(pages, self._slots_of(buffer, len(pages)))
        self._mark(buffer)

    def to_device(self, buffer: StageBuffer, pages: Sequence[int], first: int = 0) -> None:
        self.space.swap_in(self._slots_of(buffer, len(pages), first), pages)
        self._mark(buffer)

    def wait(self, index: int) -> None:
        """Return when the last copy that uses a buffer is done."""
        with self._device:
            self._marks[index].synchronize()

    def give_back(self, index: int) -> None:
        """Nobody refers to a buffer any more."""
        if not self._is_closed:
            self._free.append(index)

    def close(self) -> None:
        self._is_closed = True
        self._free.clear()
        self.space.close()
        for mark in self._marks:
            mark.close()
        self._slots = self._slots[:0]

    def _slots_of(self, buffer: StageBuffer, count: int, first: int = 0) -> range:
        assert isinstance(buffer, CudaBuffer)
        if first + count > self._num_pages:
            raise ValueError(f"{first + count} pages for a buffer of {self._num_pages}")
        slot = buffer.index * self._num_pages + first
        return range(slot, slot + count)

    def _mark(self, buffer: StageBuffer) -> None:
        assert isinstance(buffer, CudaBuffer)
        self.space.mark(self._marks[buffer.index])
