"""Contents of KV pages as host arrays: gathered into one buffer on the device, so that one copy moves many pages.

The bus runs at full speed to pinned memory alone, so a copy goes there, and threads move it on while the next one is
under way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...driver.memory import PinnedBuffer
from ...driver.stream import Event
from ...errors import CapacityError, DriverError
from ...ops.kv_pages import GATHER, SCATTER
from ...types import I32, U8, Tensor
from ..base import KvCacheHandle
from .memory import Mirror, reserve
from .runtime import Runtime

STAGE_NBYTES = 16 << 20  # of one of two buffers, on the device and on the host, but at least a page
MAX_THREADS = 8
THREAD_NBYTES = 2 << 20  # what is worth a thread


class PageCopies:
    """Pages of one cache, moved `chunk` at a time through two buffers that live as long as this does."""

    def __init__(self, runtime: Runtime, kv: KvCacheHandle) -> None:
        """Raises CapacityError when there is no room for the buffers."""
        device, nbytes = runtime.device, kv.config.page_nbytes
        self._runtime, self._config, self._cache = runtime, kv.config, kv.tensor  # not the handle: its end frees this
        self.chunk = min(kv.config.num_pages, max(1, STAGE_NBYTES // nbytes))
        self._on_device = reserve(device, self.chunk * nbytes, "a copy of KV pages")
        self._pages = Mirror(device, [("pages", (self.chunk,), I32)])
        self._pinned: list[PinnedBuffer] = []
        self._copied: list[Event] = []
        try:
            for _ in range(2):
                self._pinned.append(device.pinned(self.chunk * nbytes))
                self._copied.append(device.event())
        except DriverError as error:
            self.close()
            raise CapacityError(f"no pinned memory for a copy of KV pages: {error.explanation}") from error
        self._images = [pinned.view().reshape(self.chunk, nbytes) for pinned in self._pinned]
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "gllm-pages")

    def to_host(self, pages: Sequence[int], out: np.ndarray) -> None:
        """out[i] = the bytes of page pages[i]; returns when it is done."""
        device, stream, nbytes = self._runtime.device, self._runtime.stream, self._config.page_nbytes
        starts = range(0, len(pages), self.chunk)
        with device:
            for turn, start in enumerate((*starts, None)):
                if start is not None:
                    part = pages[start : start + self.chunk]
                    self._run(part, GATHER)
                    pinned, copied = self._pinned[turn % 2], self._copied[turn % 2]
                    device.copy_d2h(pinned.address, self._on_device.address, len(part) * nbytes, stream)
                    copied.record(stream)
                if turn:  # what was issued before, while this one is under way
                    rows = out[starts[turn - 1] : starts[turn - 1] + self.chunk]
                    self._copied[1 - turn % 2].synchronize()
                    self._move(rows, self._images[1 - turn % 2][: len(rows)])

    def from_host(self, pages: Sequence[int], data: np.ndarray) -> None:
        """Page pages[i] = the bytes data[i]; no page comes twice. Returns when it is done."""
        device, stream, nbytes = self._runtime.device, self._runtime.stream, self._config.page_nbytes
        with device:
            for turn, start in enumerate(range(0, len(pages), self.chunk)):
                part = pages[start : start + self.chunk]
                if turn >= 2:
                    self._copied[turn % 2].synchronize()
                self._move(self._images[turn % 2][: len(part)], data[start : start + len(part)])
                device.copy_h2d(self._on_device.address, self._pinned[turn % 2].address, len(part) * nbytes, stream)
                self._copied[turn % 2].record(stream)
                self._run(part, SCATTER)
            stream.synchronize()

    def _move(self, to: np.ndarray, rows: np.ndarray) -> None:
        """to[:] = rows, by threads where that is much."""
        count = max(1, min(MAX_THREADS, rows.nbytes // THREAD_NBYTES, len(rows)))
        cuts = [len(rows) * i // count for i in range(count + 1)]
        list(self._threads.map(lambda a, b: np.copyto(to[a:b], rows[a:b]), cuts[:-1], cuts[1:]))

    def _run(self, pages: Sequence[int], direction: int) -> None:
        """Gather or scatter `pages` by the op kv_pages, in the order of the stream. Needs the device's context."""
        runtime, config, N = self._runtime, self._config, len(pages)
        self._pages.host()["pages"][:N] = pages
        self._pages.upload(runtime.stream)
        cache, index = self._cache, self._pages.tensor("pages")
        program = runtime.program()
        program.add(
            "kv_pages",
            {
                "kv": Tensor(cache.address, (config.num_pages + 1, config.page_nbytes), U8, cache.owner),
                "buffer": Tensor(self._on_device.address, (N, config.page_nbytes), U8, self._on_device),
                "pages": Tensor(index.address, (N,), I32, index.owner),
            },
            {"direction": direction},
        )
        program.finish().issue()

    def close(self) -> None:
        """Give everything back; the stream's order keeps what is under way."""
        self._pages.close()
        self._on_device.free()
        for event in self._copied:
            event.close()
        for pinned in self._pinned:
            pinned.free()
        if hasattr(self, "_threads"):
            # Idle by now. No waiting: the garbage collector may call this in the middle of a thread's start.
            self._threads.shutdown(wait=False)
