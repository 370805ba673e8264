"""KV pages in host memory of their own, on a device that is host memory: copies are done when they are issued."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from cpu_backend.team import aligned

from ..base import KvCacheHandle, StageBuffer, checked

Count = Callable[[int, float, bool], None]
"""Told of each copy: bytes, seconds, whether it went to the host."""


class CpuBuffer:
    """Rows of a stage's memory, or rows that somebody else keeps instead of them."""

    def __init__(self, own: np.ndarray, free: deque[np.ndarray], data: np.ndarray) -> None:
        self.data = data
        self._own, self._free = own, free

    def wait(self) -> None:
        """Nothing is ever under way."""

    def __del__(self) -> None:
        self._free.append(self._own)


class CpuStage:
    """The buffers of one cache."""

    def __init__(self, kv: KvCacheHandle, num_pages: int, num_buffers: int, count: Count) -> None:
        config = kv.config
        self._kv = kv
        self._pages = kv.tensor.to_numpy().view(np.uint8).reshape(config.num_pages, config.page_nbytes)
        memory = aligned(num_buffers * num_pages * config.page_nbytes, 4096)  # taken as it is first written
        self._free = deque(memory.reshape(num_buffers, num_pages, config.page_nbytes))
        self._count = count

    def take(self) -> CpuBuffer | None:
        try:
            own = self._free.popleft()
        except IndexError:
            return None
        return CpuBuffer(own, self._free, own)

    def hold(self, rows: np.ndarray) -> CpuBuffer | None:
        buffer = self.take()
        if buffer is not None:
            buffer.data = rows  # as good as a copy of them
        return buffer

    def to_host(self, pages: Sequence[int], buffer: StageBuffer) -> None:
        start = perf_counter()
        for row, page in enumerate(checked(pages, len(self._pages), "page")):
            buffer.data[row] = self._pages[page]
        self._count(len(pages) * self._kv.config.page_nbytes, perf_counter() - start, True)

    def to_device(self, buffer: StageBuffer, pages: Sequence[int], first: int = 0) -> None:
        start = perf_counter()
        for row, page in enumerate(checked(pages, len(self._pages), "page"), first):
            self._pages[page] = buffer.data[row]
        self._count(len(pages) * self._kv.config.page_nbytes, perf_counter() - start, False)

    def close(self) -> None:
        self._free.clear()
