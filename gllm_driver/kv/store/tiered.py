"""Several stores as one: looked up from fast to slow, written to the slow ones in the background."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from .base import KvEntry, KvStore, StoredEntry, StoreStats, Tally, VerifyReport, total_nbytes
from .keys import KvChunkKey
from .memory import MemoryStore

QUEUE_NBYTES = 512 << 20  # of entries that wait to be written
CLOSE_TIMEOUT_S = 10.0


class TieredStore:
    """Tiers from fast to slow. A hit of a slow tier is put into the faster ones, memory at once.

    Memory tiers are written when `put` is called; all others by one background thread, from a queue of at most
    `queue_nbytes`. What finds the queue full is dropped, and counted: a slow disk costs hits, never time.
    """

    def __init__(self, tiers: Sequence[KvStore], *, queue_nbytes: int = QUEUE_NBYTES) -> None:
        self.tiers = tuple(tiers)
        self._slow = tuple(tier for tier in tiers if not isinstance(tier, MemoryStore))
        self._tally = Tally("tiers")
        self._writer = _Writer(queue_nbytes, self._tally)

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        found: list[KvEntry] = []
        missing_at: list[int | None] = [None] * len(self.tiers)  # index of the key a tier was found not to have
        level = 0
        while level < len(self.tiers) and len(found) < len(keys):
            if missing_at[level] == len(found):
                level += 1
                continue
            more = self.tiers[level].get(keys[len(found) :])
            self._store(more, self.tiers[:level])
            found += more
            missing_at[level] = len(found)
            level = 0 if more else level + 1  # a tier may go on where a slower one filled the gap
        self._tally.add(hits=len(found), misses=len(keys) - len(found), read_nbytes=total_nbytes(found))
        return found

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        found = [False] * len(keys)
        for tier in self.tiers:
            missing = [i for i, there in enumerate(found) if not there]
            if not missing:
                break
            for i, there in zip(missing, tier.contains([keys[i] for i in missing]), strict=True):
                found[i] = there
        return found

    def put(self, entries: Sequence[KvEntry]) -> None:
        self._store([replace(entry.frozen(), created=entry.created or time.time()) for entry in entries], self.tiers)

    def stats(self) -> StoreStats:
        tiers = tuple(tier.stats() for tier in self.tiers)
        return replace(self._tally.stats(), tiers=tiers)

    def entries(self) -> Iterator[StoredEntry]:
        for tier in self.tiers:
            yield from tier.entries()

    def purge(self, *, model: bytes | None = None, older_than_s: float | None = None) -> int:
        self.flush()
        return sum(tier.purge(model=model, older_than_s=older_than_s) for tier in self.tiers)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        reports = [tier.verify(repair=repair) for tier in self.tiers]
        return VerifyReport(
            sum(report.num_checked for report in reports),
            tuple(bad for report in reports for bad in report.bad),
            sum(report.num_removed for report in reports),
        )

    def flush(self, timeout_s: float | None = None) -> bool:
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        self._writer.close(CLOSE_TIMEOUT_S)
        for tier in self.tiers:
            tier.close()

    def _store(self, entries: list[KvEntry], tiers: Sequence[KvStore]) -> None:
        for tier in tiers:
            if tier in self._slow:
                self._writer.add(tier, entries)
            else:
                tier.put(entries)


class _Writer:
    """A thread that puts entries into stores, one after the other, in the order they came."""

    def __init__(self, capacity_nbytes: int, tally: Tally) -> None:
        self._capacity_nbytes = capacity_nbytes
        self._tally = tally
        self._queue: deque[tuple[KvStore, KvEntry]] = deque()
        self._nbytes = 0  # in the queue, and in the hands of the thread
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None  # started by the first entry

    def add(self, store: KvStore, entries: Sequence[KvEntry]) -> None:
        dropped = 0
        with self._changed:
            for entry in entries:
                if self._closing or self._nbytes + entry.nbytes > self._capacity_nbytes:
                    dropped += 1
                    continue
                self._queue.append((store, entry))
                self._nbytes += entry.nbytes
            if self._queue and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._run, name="kv-store-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if dropped:
            self._tally.fault("dropped", f"{self._capacity_nbytes} bytes wait already", dropped)

    def flush(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._nbytes == 0, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what waits; what is not written in time is dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        self.flush(timeout_s)
        with self._changed:
            self._nbytes -= sum(entry.nbytes for _, entry in self._queue)
            dropped = len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        if dropped:
            self._tally.fault("dropped", f"not written within {timeout_s:g} s of closing", dropped)
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()) + 1.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                store, entry = self._queue.popleft()
            try:
                store.put([entry])
            finally:
                with self._changed:
                    self._nbytes -= entry.nbytes
                    self._changed.notify_all()
