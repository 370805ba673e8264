"""Entries in this process's memory, the least recently used of them given up for new ones."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import StoreError
from .base import KvEntry, StoredEntry, StoreStats, Tally, VerifyReport, selected
from .checksum import tree_digest
from .codec import Codec
from .header import header_nbytes
from .keys import KvChunkKey


@dataclass(frozen=True)
class _Held:
    """An entry as it is (`packed` None), with its checksum, or packed by the store's codec."""

    entry: KvEntry | None
    checksum: bytes
    packed: bytes | None
    key: KvChunkKey
    created: float
    nbytes: int


class MemoryStore:
    """At most `capacity_nbytes` of entries, headers counted. Hits share the store's memory: nothing is copied.

    verify: compare the checksum at every hit. Off, a hit costs nothing and bytes that changed in memory are not seen.
    """

    def __init__(
        self, capacity_nbytes: int, *, codec: Codec | None = None, verify: bool = True, name: str = "memory"
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self._codec = codec or Codec()
        self._verify = verify
        self._tally = Tally(name)
        self._lock = threading.Lock()
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # by digest, used longest ago first
        self._nbytes = 0

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        found: list[KvEntry] = []
        for key in keys:
            with self._lock:
                held = self._held.get(key.digest)
                if held is not None:
                    self._held.move_to_end(key.digest)
            if held is None:
                break
            try:
                found.append(self._opened(held, key))
            except StoreError as error:
                self._tally.failed(error)
                self._drop(key.digest, held)
                break
        self._tally.add(
            hits=len(found), misses=len(keys) - len(found), read_nbytes=sum(entry.nbytes for entry in found)
        )
        return found

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        with self._lock:
            return [(held := self._held.get(key.digest)) is not None and held.key == key for key in keys]

    def put(self, entries: Sequence[KvEntry]) -> None:
        for entry in entries:
            with self._lock:
                held = self._held.get(entry.key.digest)
                if held is not None and held.key == entry.key:
                    self._held.move_to_end(entry.key.digest)
                    continue
            try:
                self._keep(self._packed(entry))
            except StoreError as error:
                self._tally.failed(error)

    def stats(self) -> StoreStats:
        with self._lock:
            count, nbytes = len(self._held), self._nbytes
        return self._tally.stats(num_entries=count, nbytes=nbytes, capacity_nbytes=self.capacity_nbytes)

    def entries(self) -> Iterator[StoredEntry]:
        with self._lock:
            listed = list(self._held.values())
        return (self._described(held) for held in listed)

    def purge(self, *, model: bytes | None = None, older_than_s: float | None = None) -> int:
        with self._lock:
            listed = list(self._held.items())
        gone = [(d, held) for d, held in listed if selected(self._described(held), model, older_than_s)]
        return sum(self._drop(digest, held) for digest, held in gone)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        with self._lock:
            listed = list(self._held.items())
        bad = []
        removed = 0
        for digest, held in listed:
            error = self._fault_of(held)
            if error is not None:
                bad.append((digest.hex(), error.reason, str(error)))
                removed += repair and self._drop(digest, held)
        return VerifyReport(len(listed), tuple(bad), removed)

    def flush(self, timeout_s: float | None = None) -> bool:
        return True

    def close(self) -> None:
        with self._lock:
            self._held.clear()
            self._nbytes = 0

    def audit(self) -> None:
        """Raise AssertionError unless the bytes held are those counted, and no more than allowed."""
        with self._lock:
            assert self._nbytes == sum(held.nbytes for held in self._held.values()), "bytes are miscounted"
            assert self._nbytes <= self.capacity_nbytes, "more bytes than allowed"

    def _described(self, held: _Held) -> StoredEntry:
        return StoredEntry.of(held.key, held.key.digest.hex(), held.nbytes, held.created, str(self._codec))

    def _packed(self, entry: KvEntry) -> _Held:
        created = entry.created or time.time()
        if self._codec == Codec():
            entry = replace(entry.frozen(), created=created)
            checksum = tree_digest(entry.data.data) if self._verify else b""
            return _Held(entry, checksum, None, entry.key, created, header_nbytes(entry.key.num_tokens) + entry.nbytes)
        header, body = self._codec.encode(replace(entry, created=created))
        packed = b"".join((header, body))
        return _Held(None, b"", packed, entry.key, created, len(packed))

    def _opened(self, held: _Held, key: KvChunkKey, *, always: bool = False) -> KvEntry:
        """The entry, if it is that of the key. Raises StoreError."""
        if held.packed is not None:
            return self._codec.decode(held.packed, key, verify=self._verify or always)
        assert held.entry is not None
        if held.key != key:
            raise StoreError("tokens", "the KV of other tokens")
        if held.checksum and tree_digest(held.entry.data.data) != held.checksum:
            raise StoreError("checksum", "the body changed since it was put")
        return held.entry

    def _fault_of(self, held: _Held) -> StoreError | None:
        try:
            self._opened(held, held.key, always=True)
        except StoreError as error:
            return error
        return None

    def _keep(self, held: _Held) -> None:
        if held.nbytes > self.capacity_nbytes:
            raise StoreError("oversize", f"a chunk of {held.nbytes} bytes, room for {self.capacity_nbytes}")
        evicted = 0
        with self._lock:
            before = self._held.pop(held.key.digest, None)
            self._nbytes -= before.nbytes if before is not None else 0
            while self._nbytes + held.nbytes > self.capacity_nbytes:
                _, oldest = self._held.popitem(last=False)
                self._nbytes -= oldest.nbytes
                evicted += 1
            self._held[held.key.digest] = held
            self._nbytes += held.nbytes
        self._tally.add(puts=1, evictions=evicted, written_nbytes=held.key.payload_nbytes)

    def _drop(self, digest: bytes, held: _Held) -> bool:
        """Remove an entry unless another has taken its place."""
        with self._lock:
            if self._held.get(digest) is not held:
                return False
            del self._held[digest]
            self._nbytes -= held.nbytes
            return True
