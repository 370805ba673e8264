"""Host memory to the device at the speed of the bus: threads copy it into pinned buffers, a stream copies from there.

A mapped file cannot be copied from directly at full speed; one thread that moves its bytes is slower than the bus.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...driver.device import Device
from ...driver.memory import PinnedBuffer
from ...driver.stream import Event, Stream
from ...errors import DriverError

PIECE_NBYTES = 4 << 20
MAX_WORKERS = 8
BUFFERS_PER_WORKER = 2  # one is filled while the other is copied


@dataclass(frozen=True)
class Span:
    """Bytes of the host, and where they go: an offset from the start of what they are part of."""

    source: int
    at: int
    nbytes: int


@dataclass(frozen=True)
class Window:
    """Consecutive bytes of a target, [start, start + nbytes); spans count from `start`, zeros fill what they leave."""

    start: int
    nbytes: int
    spans: tuple[Span, ...]


def windows(spans: Iterable[Span], total: int, size: int) -> Iterator[Window]:
    """`total` bytes made of `spans`, in order, in windows of `size` bytes and a rest."""
    left = list(spans)[::-1]
    for start in range(0, total, size):
        nbytes, found = min(size, total - start), []
        while left and left[-1].at < start + nbytes:
            span = left.pop()
            fits = min(span.nbytes, start + nbytes - span.at)
            found.append(Span(span.source, span.at - start, fits))
            if fits < span.nbytes:
                left.append(Span(span.source + fits, span.at + fits, span.nbytes - fits))
        yield Window(start, nbytes, tuple(found))


@dataclass(frozen=True)
class Job:
    """One region of the device to be written. `gate` holds its copies back until it is set."""

    address: int
    window: Window
    gate: threading.Event | None = None


class Transfer:
    """Jobs under way, in order, from `with` on; `wait_issued` tells of each."""

    def __init__(self, device: Device, jobs: Sequence[Job]) -> None:
        self._device, self._jobs = device, jobs
        self._pieces = [
            (index, piece)
            for index, job in enumerate(jobs)
            for piece in windows(job.window.spans, job.window.nbytes, PIECE_NBYTES)
        ]
        self._left = [-(-job.window.nbytes // PIECE_NBYTES) for job in jobs]
        self._issued = [threading.Event() for _ in jobs]
        self._next = itertools.count()
        self._error: BaseException | None = None
        self._stopped = False
        self._lock = threading.Lock()
        self._buffers: list[tuple[PinnedBuffer, Event]] = []
        self._stream: Stream = device.stream()
        self._copied: Event | None = None
        count = min(MAX_WORKERS, os.cpu_count() or 1, max(len(self._pieces), 1))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]

    def __enter__(self) -> Transfer:
        try:
            self._copied = self._device.event()
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def wait_issued(self, job: int, stream: Stream) -> None:
        """Return when the copies of a job are queued; what `stream` is given from now on comes after them.

        Needs the device's context. Raises the error of the thread that failed.
        """
        self._issued[job].wait()
        if self._error is not None:
            raise self._error
        assert self._copied is not None
        with self._lock:
            self._copied.record(self._stream)
        stream.wait(self._copied)

    def open_gate(self, gate: threading.Event, after: Event) -> None:
        """Let the jobs behind `gate` begin, after what `after` marks. Needs the device's context."""
        with self._lock:
            self._stream.wait(after)
        gate.set()

    def _buffer(self) -> tuple[PinnedBuffer, Event]:
        """A new one: pinning memory takes longer than filling it, so each thread does it while others copy."""
        buffer = self._device.pinned(max(piece.nbytes for _, piece in self._pieces))
        event = self._device.event()
        with self._lock:
            self._buffers.append((buffer, event))
        return buffer, event

    def _work(self) -> None:
        own: list[tuple[PinnedBuffer, Event]] = []
        try:
            with self._device:
                for turn in itertools.count():
                    number = next(self._next)
                    if self._stopped or number >= len(self._pieces):
                        return
                    if turn < BUFFERS_PER_WORKER:
                        own.append(self._buffer())
                    buffer, copied = own[turn % BUFFERS_PER_WORKER]
                    if turn >= BUFFERS_PER_WORKER:
                        copied.synchronize()
                    index, piece = self._pieces[number]
                    _fill(buffer.address, piece)
                    job = self._jobs[index]
                    if job.gate is not None:
                        job.gate.wait()
                    if self._stopped:
                        return
                    with self._lock:
                        self._device.copy_h2d(job.address + piece.start, buffer.address, piece.nbytes, self._stream)
                        copied.record(self._stream)
                        self._left[index] -= 1
                        if not self._left[index]:
                            self._issued[index].set()
        except BaseException as error:
            self._error = self._error or error
            self._stop()

    def _stop(self) -> None:
        """Let every thread that waits find that it is over."""
        self._stopped = True
        for issued in self._issued:
            issued.set()
        for job in self._jobs:
            if job.gate is not None:
                job.gate.set()

    def _close(self) -> None:
        self._stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        with contextlib.suppress(DriverError), self._device:  # an error of the work before it is its caller's to hear
            self._stream.synchronize()
        for buffer, event in self._buffers:
            event.close()
            buffer.free()
        if self._copied is not None:
            self._copied.close()
        self._stream.close()


def _fill(address: int, piece: Window) -> None:
    """The piece's bytes at `address`. The interpreter is free for other threads meanwhile."""
    at = 0
    for span in piece.spans:
        if span.at > at:
            ctypes.memset(address + at, 0, span.at - at)
        ctypes.memmove(address + span.at, span.source, span.nbytes)
        at = span.at + span.nbytes
    if at < piece.nbytes:
        ctypes.memset(address + at, 0, piece.nbytes - at)
