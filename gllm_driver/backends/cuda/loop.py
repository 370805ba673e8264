"""The decode loop: sequences that go on together, with nothing but the tokens' ids crossing the bus."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter

from ..base import DecodeRow, KvCacheHandle, WeightsHandle
from .decode import SLOTS, Decoder, DecoderPool
from .runtime import Runtime

Touch = Callable[[Sequence[int], int], None]
"""Told of pages before steps use them, and from which on they write: copies that are under way come first."""


@dataclass
class _Held:
    """The decoder a loop has at present, None after its end."""

    pool: DecoderPool
    decoder: Decoder | None

    def let_go(self) -> None:
        decoder, self.decoder = self.decoder, None
        if decoder is not None:
            self.pool.give_back(decoder)


class CudaDecodeLoop:
    """Steps of the same sequences; ids, positions and counts stay and advance on the device.

    Between steps the device waits for the host to work on the tokens. A step that is begun before it is asked for hides
    that, and is in vain when the loop ends. So the loop begins to run ahead when it has lost as much time as a step
    takes: whether it ends soon or late, it loses at most twice what it must.
    """

    def __init__(
        self,
        runtime: Runtime,
        pool: DecoderPool,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        rows: Sequence[DecodeRow],
        touch: Touch,
    ) -> None:
        self._runtime, self._pool, self._model, self._touch = runtime, pool, (weights, kv), touch
        self._has_penalties = any(row.sampling.has_penalties for row in rows)
        self._pages = [list(row.pages) for row in rows]
        self._positions = [row.position for row in rows]  # at the start
        self._runs_ahead = False
        self._lost_s = 0.0  # time in which the device had nothing to do
        self._returned_at = inf
        self._launched = 0
        self._unread: deque[int] = deque()  # slots of steps under way, oldest first
        self._read: deque[list[int]] = deque()  # tokens that were read before they were asked for
        self._changes: dict[int, int] = {}  # row → first entry of its page table to be brought up to date
        decoder = pool.take(weights, kv, len(rows), max(map(len, self._pages)), self._has_penalties)
        self._held = _Held(pool, decoder)
        self._end = weakref.finalize(self, self._held.let_go)
        self._end.atexit = False
        for pages, position in zip(self._pages, self._positions, strict=True):
            touch(pages, position // kv.config.page_size)
        self._set_limit()
        with runtime.device:
            decoder.start(rows)

    @property
    def decoder(self) -> Decoder:
        """What runs the steps at present. Raises ValueError when the loop is closed."""
        if self._held.decoder is None:
            raise ValueError("this decode loop is closed")
        return self._held.decoder

    def step(self) -> list[int]:
        """Run one forward pass on the last tokens and sample the next: an id per row, −1 where there is no number."""
        decoder = self.decoder
        called_at = perf_counter()
        self._runtime.num_forwards += 1  # it writes where the logits of forward passes are
        with self._runtime.device:
            if self._changes:
                decoder = self._bring_up_pages(decoder)
            if not self._unread and not self._read:
                self._launch(decoder)
            if self._runs_ahead and len(self._unread) == 1 and self._launched < self._limit:
                self._launch(decoder)
            tokens = self._read.popleft() if self._read else decoder.tokens(self._unread.popleft(), len(self._pages))
        if not self._runs_ahead:
            self._lost_s += max(called_at - self._returned_at, 0.0)
            self._returned_at = perf_counter()
            self._runs_ahead = self._lost_s >= self._returned_at - called_at
        return tokens

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The page list of a row has grown: from the next step on it may use the new pages."""
        old = self._pages[row]
        same = len(old) if list(pages[: len(old)]) == old else 0
        if same == len(pages):
            return
        self._changes[row] = min(same, self._changes.get(row, same))
        self._pages[row] = list(pages)
        self._touch(pages[same:], 0)
        self._set_limit()

    def uses(self, kv: KvCacheHandle, pages: Sequence[int]) -> bool:
        """Whether its sequences have any of these pages of the cache."""
        is_mine = self._held.decoder is not None and self._model[1] is kv
        return is_mine and any(not set(pages).isdisjoint(own) for own in self._pages)

    def close(self) -> None:
        """End the loop; a step under way finishes, unread."""
        self._end()

    def _set_limit(self) -> None:
        """How many steps there are pages for, counted from the start."""
        page_size = self._model[1].config.page_size
        room = [len(own) * page_size - at for own, at in zip(self._pages, self._positions, strict=True)]
        self._limit = min(room)

    def _launch(self, decoder: Decoder) -> None:
        if self._launched >= self._limit:
            full = next(
                i
                for i, (own, at) in enumerate(zip(self._pages, self._positions, strict=True))
                if len(own) * self._model[1].config.page_size - at == self._limit
            )
            raise ValueError(
                f"row {full} of the decode loop has {len(self._pages[full])} pages, none for position "
                f"{self._positions[full] + self._launched}: call set_pages first"
            )
        slot = self._launched % SLOTS
        decoder.launch(slot)
        self._unread.append(slot)
        self._launched += 1

    def _bring_up_pages(self, decoder: Decoder) -> Decoder:
        """Page tables on the device as set_pages left them; a wider decoder takes over where one is too narrow."""
        changes, self._changes = self._changes, {}
        most = max(map(len, self._pages))
        if most <= decoder.table_width:
            decoder.set_pages([(row, first, self._pages[row][first:]) for row, first in changes.items()])
            return decoder
        wider = self._pool.take(*self._model, len(self._pages), most, self._has_penalties)
        try:
            while self._unread:
                self._read.append(decoder.tokens(self._unread.popleft(), len(self._pages)))
            wider.take_over(decoder, self._pages)
        except BaseException:
            self._pool.give_back(wider)
            raise
        self._pool.give_back(decoder)
        self._held.decoder = wider
        return wider
