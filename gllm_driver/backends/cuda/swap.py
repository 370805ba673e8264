"""KV pages between the device and pinned slots on the host: a stream of their own, beside the steps.

Copies wait for the steps issued before them; a step waits for copies into pages that it reads or writes and for copies
of pages that it writes, and for no others. Copies of one space follow each other in order, so a slot is never
overwritten while an earlier copy still reads it; those of a cache's other spaces they wait for as a step does.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...driver.memory import size_text
from ...driver.stream import Event, Stream
from ...errors import CapacityError, DriverError
from ..base import KvCacheHandle, checked
from .runtime import Runtime


@dataclass(frozen=True)
class SwapStats:
    """What has been moved so far; seconds are those of the copies on the bus."""

    pages_out: int = 0
    pages_in: int = 0
    nbytes_out: int = 0
    nbytes_in: int = 0
    seconds_out: float = 0.0
    seconds_in: float = 0.0

    @property
    def gb_per_s_out(self) -> float:
        return self.nbytes_out / self.seconds_out / 1e9 if self.seconds_out else 0.0

    @property
    def gb_per_s_in(self) -> float:
        return self.nbytes_in / self.seconds_in / 1e9 if self.seconds_in else 0.0


@dataclass
class _Move:
    """Copies under way."""

    pages: frozenset[int]
    is_out: bool
    begun: Event
    done: Event


class SwapSpace:
    """The host slots of one cache, a page each."""

    def __init__(
        self, runtime: Runtime, kv: KvCacheHandle, num_slots: int, spaces: list[SwapSpace] | None = None
    ) -> None:
        """`spaces`: all of this cache, which it joins. Raises CapacityError when the host cannot pin so much memory."""
        device = runtime.device
        self._runtime, self._config, self._address = runtime, kv.config, kv.tensor.address
        self.num_slots = num_slots
        nbytes = num_slots * kv.config.page_nbytes
        try:
            self._slots = device.pinned(nbytes)
        except DriverError as error:
            raise CapacityError(
                f"no room on the host for {num_slots} swapped KV pages ({size_text(nbytes)} of pinned memory): "
                f"{error.explanation}; ask for fewer"
            ) from error
        self._stream = device.stream()
        self._steps_done = device.event()
        self._idle_events: list[Event] = []
        # Of the two below: any thread may ask for the counters. Re-entrant: the garbage collector may close this then.
        self._lock = threading.RLock()
        self._moves: deque[_Move] = deque()  # oldest first
        self._stats = SwapStats()
        self._spaces = [] if spaces is None else spaces
        self._spaces.append(self)

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy pages to slots."""
        self._move(pages, slots, is_out=True)

    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy slots to pages. If it fails, the slots still hold what they held, the pages may not."""
        self._move(pages, slots, is_out=False)

    def before(self, pages: Collection[int], written: Collection[int], stream: Stream | None = None) -> None:
        """Let what `stream` is given from now on, which uses `pages` and writes those of them that are `written`, wait
        for copies. Without a stream: the steps to come."""
        if not self._moves:
            return
        with self._runtime.device, self._lock:
            self._settle()
            last = next(
                (m for m in reversed(self._moves) if not m.pages.isdisjoint(written if m.is_out else pages)), None
            )
            if last is not None:  # copies run in order: it is the last of those it must wait for
                (stream or self._runtime.stream).wait(last.done)

    def wait(self) -> None:
        """Return when every copy is done. Raises ContextLost if one failed."""
        with self._runtime.device:
            self._stream.synchronize()
            with self._lock:
                self._settle()

    def stats(self) -> SwapStats:
        """The counters, of copies that are done."""
        if self._moves:
            with self._runtime.device, self._lock:
                self._settle()
        return self._stats

    def close(self) -> None:
        """Give everything back, once the copies are done."""
        with contextlib.suppress(DriverError):  # an error of the work before it is its caller's to hear
            self.wait()
        with contextlib.suppress(ValueError):  # closed before
            self._spaces.remove(self)
        for move in self._moves:
            self._idle_events += [move.begun, move.done]
        self._moves.clear()
        for event in [self._steps_done, *self._idle_events]:
            event.close()
        self._idle_events.clear()
        self._stream.close()
        self._slots.free()

    def slots(self) -> np.ndarray:
        """The slots' memory, u8 [num_slots, page_nbytes]; not to be used after `close`."""
        return self._slots.view()[: self.num_slots * self._config.page_nbytes].reshape(self.num_slots, -1)

    def mark(self, event: Event) -> None:
        """Record `event` after the copies issued so far."""
        with self._runtime.device:
            event.record(self._stream)

    def _move(self, pages: Sequence[int], slots: Sequence[int], *, is_out: bool) -> None:
        self._check(pages, slots)
        if not len(pages):
            return
        device, nbytes, stream = self._runtime.device, self._config.page_nbytes, self._stream
        with device:
            for space in self._spaces:
                if space is not self:
                    space.before(pages, () if is_out else pages, stream)
            with self._lock:
                self._settle()
                begun, done = self._event(), self._event()
            try:
                self._steps_done.record(self._runtime.stream)
                stream.wait(self._steps_done)
                begun.record(stream)
                for page, slot, count in runs(pages, slots):
                    on_device, on_host = self._address + page * nbytes, self._slots.address + slot * nbytes
                    if is_out:
                        device.copy_d2h(on_host, on_device, count * nbytes, stream)
                    else:
                        device.copy_h2d(on_device, on_host, count * nbytes, stream)
                done.record(stream)
            except BaseException:
                self._idle_events += [begun, done]
                with contextlib.suppress(DriverError):  # the first error counts
                    stream.synchronize()  # no step waits for what was issued: it must not be under way any more
                raise
            with self._lock:
                self._moves.append(_Move(frozenset(pages), is_out, begun, done))

    def _check(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        if len(pages) != len(slots):
            raise ValueError(f"{len(pages)} pages and {len(slots)} slots: each page has a slot of its own")
        for what, items, limit in (("page", pages, self._config.num_pages), ("slot", slots, self.num_slots)):
            if len(set(checked(items, limit, what))) != len(items):
                raise ValueError(f"a {what} comes twice: {sorted(items)}")

    def _event(self) -> Event:
        return self._idle_events.pop() if self._idle_events else self._runtime.device.event(timing=True)

    def _settle(self) -> None:
        """Count the copies that are done. Needs the device's context and the lock."""
        while self._moves and self._moves[0].done.is_done():
            move = self._moves.popleft()
            seconds = move.done.elapsed_ms(move.begun) / 1e3
            self._idle_events += [move.begun, move.done]
            count, nbytes, old = len(move.pages), len(move.pages) * self._config.page_nbytes, self._stats
            out, back = (1, 0) if move.is_out else (0, 1)
            self._stats = SwapStats(
                pages_out=old.pages_out + out * count,
                pages_in=old.pages_in + back * count,
                nbytes_out=old.nbytes_out + out * nbytes,
                nbytes_in=old.nbytes_in + back * nbytes,
                seconds_out=old.seconds_out + out * seconds,
                seconds_in=old.seconds_in + back * seconds,
            )


def runs(pages: Sequence[int], slots: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first page, first slot, how many): pairs in order of page, those that continue each other as one copy."""
    pairs = sorted(zip(pages, slots, strict=True))
    start = 0
    for i in range(1, len(pairs) + 1):
        (page, slot), n = pairs[start], i - start
        if i == len(pairs) or pairs[i] != (page + n, slot + n):
            yield page, slot, n
            start = i
