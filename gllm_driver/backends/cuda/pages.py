"""Contents of KV pages as host arrays: gathered into one buffer on the device, so that one copy moves many pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...ops.kv_pages import GATHER, SCATTER
from ...types import I32, U8, Tensor
from ..base import KvCacheHandle
from .memory import Mirror, reserve
from .runtime import Runtime

STAGE_NBYTES = 32 << 20  # of device memory at a time, but at least a page


class PageCopies:
    """Pages of one cache, moved `chunk` at a time through a buffer on the device that lives as long as this does."""

    def __init__(self, runtime: Runtime, kv: KvCacheHandle, num_pages: int) -> None:
        """Raises CapacityError when there is no room for the buffer."""
        self._runtime, self._kv = runtime, kv
        self.chunk = min(num_pages, max(1, STAGE_NBYTES // kv.config.page_nbytes))
        self._buffer = reserve(runtime.device, self.chunk * kv.config.page_nbytes, "a copy of KV pages")
        self._pages = Mirror(runtime.device, [("pages", (self.chunk,), I32)])

    def to_host(self, pages: Sequence[int], out: np.ndarray) -> None:
        """out[i] = the bytes of page pages[i]; returns when it is done."""
        runtime, nbytes = self._runtime, self._kv.config.page_nbytes
        with runtime.device:
            for start in range(0, len(pages), self.chunk):
                part = pages[start : start + self.chunk]
                self._run(part, GATHER)
                address = out[start:].ctypes.data
                runtime.device.copy_d2h(address, self._buffer.address, len(part) * nbytes, runtime.stream)
            runtime.stream.synchronize()

    def from_host(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Page pages[i] = the bytes data[i]; no page comes twice. Returns when `data` may change."""
        runtime, nbytes = self._runtime, self._kv.config.page_nbytes
        with runtime.device:
            for start in range(0, len(pages), self.chunk):
                part = pages[start : start + self.chunk]
                address = data[start:].ctypes.data
                runtime.device.copy_h2d(self._buffer.address, address, len(part) * nbytes, runtime.stream)
                self._run(part, SCATTER)
            runtime.stream.synchronize()

    def _run(self, pages: Sequence[int], direction: int) -> None:
        """Gather or scatter `pages` by the op kv_pages, in the order of the stream. Needs the device's context."""
        runtime, config, N = self._runtime, self._kv.config, len(pages)
        self._pages.host()["pages"][:N] = pages
        self._pages.upload(runtime.stream)
        cache, index = self._kv.tensor, self._pages.tensor("pages")
        program = runtime.program()
        program.add(
            "kv_pages",
            {
                "kv": Tensor(cache.address, (config.num_pages + 1, config.page_nbytes), U8, cache.owner),
                "buffer": Tensor(self._buffer.address, (N, config.page_nbytes), U8, self._buffer),
                "pages": Tensor(index.address, (N,), I32, index.owner),
            },
            {"direction": direction},
        )
        program.finish().issue()

    def close(self) -> None:
        """Give everything back; the stream's order keeps what is under way."""
        self._pages.close()
        self._buffer.free()
