"""Streams and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .gate import call, cleanup, cu

if TYPE_CHECKING:
    from .device import Device
    from .graph import Graph

_NOT_READY = 600


@dataclass
class CapturedTraffic:
    """Bytes that one launch of the graph being captured will move."""

    h2d_nbytes: int = 0
    d2h_nbytes: int = 0

    def add(self, h2d_nbytes: int, d2h_nbytes: int) -> None:
        self.h2d_nbytes += h2d_nbytes
        self.d2h_nbytes += d2h_nbytes


class Stream:
    """A queue of work on the device, run in order. Needs the device's context on the calling thread."""

    def __init__(self, device: Device, priority: int = 0) -> None:
        self.device = device
        self.captured: CapturedTraffic | None = None  # not None while a capture is on
        with device:
            self.handle = call(cu.cuStreamCreateWithPriority, cu.CUstream_flags.CU_STREAM_NON_BLOCKING, priority)
        device.keep(self)

    def synchronize(self) -> None:
        """Wait until all work issued so far is done. Raises ContextLost if any of it failed."""
        call(cu.cuStreamSynchronize, self.handle)

    def is_idle(self) -> bool:
        """Whether all work issued so far is done; does not wait."""
        return _is_done(cu.cuStreamQuery, self.handle)

    def wait(self, event: Event) -> None:
        """Let work issued from now on start after `event`, which was recorded on another stream."""
        call(cu.cuStreamWaitEvent, self.handle, event.handle, 0)

    def capture(self, record: Callable[[], None]) -> Graph:
        """The graph of the work `record` issues to this stream (and to streams that wait for it and are waited for).

        Nothing runs. Raises DriverError when something cannot be captured: memory allocated, a synchronous call made.
        """
        from .graph import Graph

        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call(cu.cuStreamBeginCapture, self.handle, mode)
        self.captured = traffic = CapturedTraffic()
        try:
            record()
            captured = call(cu.cuStreamEndCapture, self.handle)
        except BaseException:
            self._abandon_capture()
            raise
        finally:
            self.captured = None
        return Graph(self.device, captured, traffic)

    def close(self) -> None:
        """Destroy the stream, when its work is done."""
        handle, self.handle = self.handle, None
        if handle is not None:
            cleanup(cu.cuStreamDestroy, handle, context=self.device.context)
            self.device.drop(self)

    def _abandon_capture(self) -> None:
        _, graph = cu.cuStreamEndCapture(self.handle)  # fails as a rule: what was captured is spoiled, or ended
        if graph is not None and int(graph):
            cleanup(cu.cuGraphDestroy, graph)


class Event:
    """A mark in a stream that others can wait for. Needs the device's context on the calling thread."""

    def __init__(self, device: Device, timing: bool = False) -> None:
        self.device = device
        flags = cu.CUevent_flags.CU_EVENT_DEFAULT if timing else cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        with device:
            self.handle = call(cu.cuEventCreate, flags)
        device.keep(self)

    def record(self, stream: Stream) -> None:
        """Mark this point of the stream; an earlier mark is forgotten."""
        call(cu.cuEventRecord, self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the stream has passed the mark. Raises ContextLost if work before it failed."""
        call(cu.cuEventSynchronize, self.handle)

    def is_done(self) -> bool:
        """Whether the stream has passed the mark; does not wait."""
        return _is_done(cu.cuEventQuery, self.handle)

    def elapsed_ms(self, since: Event) -> float:
        """Milliseconds from `since` to here. Both must be timing events that have been passed."""
        return float(call(cu.cuEventElapsedTime, since.handle, self.handle))

    def close(self) -> None:
        """Destroy the event."""
        handle, self.handle = self.handle, None
        if handle is not None:
            cleanup(cu.cuEventDestroy, handle, context=self.device.context)
            self.device.drop(self)


def _is_done(query: Callable[..., tuple[cu.CUresult]], handle: object) -> bool:
    from ..errors import DriverError

    try:
        call(query, handle)
    except DriverError as error:
        if error.code != _NOT_READY:
            raise
        return False
    return True
