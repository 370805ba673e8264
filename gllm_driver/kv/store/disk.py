"""Entries in files, one each, in a directory that any number of processes may share."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...errors import StoreError
from .base import DAMAGED, KvEntry, StoredEntry, StoreStats, Tally, VerifyReport, selected, total_nbytes
from .codec import Codec, check_entry
from .header import MAX_HEADER_NBYTES, MAX_PAYLOAD_NBYTES, Header, header_nbytes_of, parse_header
from .keys import KvChunkKey
from .shards import Shards

FORMAT_DIRECTORY = "kv1"  # another version of the format lives beside it, not in it
LEFTOVER_AGE_S = 3600.0  # a half-written file older than this has no writer any more
FULL_PAUSE_S = 10.0  # after "no space left", nothing is written for so long
_HEAD_NBYTES = 4096  # holds the header of a chunk of 256 tokens
_LOW_WATER = 0.9  # eviction goes down to this share of the capacity
_UNSEEN_SHARE = 16  # after writing 1/16 of the capacity, look at what others have written


class DiskStore:
    """At most about `capacity_nbytes` of files under `directory`, those used longest ago removed for new ones.

    One process alone never holds more; of several, each looks again after writing a sixteenth of the capacity.
    """

    def __init__(
        self,
        directory: Path,
        capacity_nbytes: int,
        *,
        codec: Codec | None = None,
        namespace: str = "",
        fsync: bool = True,
        name: str | None = None,
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self._codec = codec or Codec()
        self._namespace = namespace
        self._fsync = fsync
        self._files = Shards(directory.expanduser() / FORMAT_DIRECTORY)
        self._tally = Tally(name or f"disk:{directory}")
        self._lock = threading.Lock()  # of the three below; never held while a file is read or written
        self._seen_nbytes: int | None = None  # in the directory when it was last looked at
        self._unseen_nbytes = 0  # written by this process since
        self._full_until = 0.0

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        found: list[KvEntry] = []
        for key in keys:
            entry = self._read(key)
            if entry is None:
                break
            found.append(entry)
        self._tally.add(hits=len(found), misses=len(keys) - len(found), read_nbytes=total_nbytes(found))
        return found

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        return [self._files.has(self._name(key)) for key in keys]

    def put(self, entries: Sequence[KvEntry]) -> None:
        for entry in entries:
            name = self._name(entry.key)
            if self._files.has(name):
                self._files.touch(name)
            else:
                self._write(name, entry)

    def stats(self) -> StoreStats:
        return self._tally.stats(capacity_nbytes=self.capacity_nbytes)

    def entries(self) -> Iterator[StoredEntry]:
        for file in self._files.scan():
            header = self._header(file.name)
            if header is not None:
                yield StoredEntry.of(header.key, file.name, file.nbytes, header.created, header.codec)

    def purge(self, *, model: bytes | None = None, older_than_s: float | None = None) -> int:
        if model is None and older_than_s is None:
            self._files.remove_leftovers(LEFTOVER_AGE_S)
            names = [file.name for file in self._files.scan()]  # damaged ones too
        else:
            now = time.time()
            names = [entry.name for entry in self.entries() if selected(entry, model, older_than_s, now)]
        return sum(self._remove(name) for name in names)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        checked = removed = 0
        bad = []
        for file in self._files.scan():
            error = self._fault_of(file.name)
            checked += 1
            if error is not None:
                bad.append((file.name, error.reason, str(error)))
                removed += repair and error.reason in DAMAGED and self._remove(file.name)
        return VerifyReport(checked, tuple(bad), removed)

    def flush(self, timeout_s: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass

    def _name(self, key: KvChunkKey) -> str:
        return key.digest.hex() + self._namespace

    def _read(self, key: KvChunkKey) -> KvEntry | None:
        name = self._name(key)
        try:
            data = self._files.read(name, self._codec.max_nbytes(key))
            return None if data is None else self._codec.decode(data, key)
        except StoreError as error:
            self._tally.failed(error)
            if error.reason in DAMAGED:
                self._remove(name)
            return None

    def _remove(self, name: str) -> bool:
        """False if it was not there, or is there still."""
        try:
            return self._files.remove(name)
        except StoreError as error:
            self._tally.failed(error)
            return False

    def _write(self, name: str, entry: KvEntry) -> None:
        if time.monotonic() < self._full_until:
            self._tally.failed(StoreError("full", "the disk was full a moment ago"))
            return
        try:
            parts = self._codec.encode(entry)
            nbytes = sum(len(part) for part in parts)
            if nbytes > self.capacity_nbytes:
                raise StoreError("oversize", f"a chunk of {nbytes} bytes, room for {self.capacity_nbytes}")
            self._make_room(nbytes)
            self._files.write(name, parts, fsync=self._fsync)
        except StoreError as error:
            self._tally.failed(error)
            if error.reason == "full":
                self._full_until = max(self._full_until, time.monotonic() + FULL_PAUSE_S)
            return
        with self._lock:
            self._unseen_nbytes += nbytes
        self._tally.add(puts=1, written_nbytes=entry.nbytes)

    def _make_room(self, nbytes: int) -> None:
        """Look at the directory if that is due, and remove files until `nbytes` more fit."""
        with self._lock:
            seen, unseen = self._seen_nbytes, self._unseen_nbytes + nbytes
        if (
            seen is not None
            and seen + unseen <= self.capacity_nbytes
            and unseen * _UNSEEN_SHARE <= self.capacity_nbytes
        ):
            return
        total = self._files.remove_leftovers(LEFTOVER_AGE_S)
        files = list(self._files.scan())
        total += sum(file.nbytes for file in files)
        evicted = 0
        if total + nbytes > self.capacity_nbytes:
            wanted = min(int(_LOW_WATER * self.capacity_nbytes), self.capacity_nbytes - nbytes)
            for file in sorted(files, key=lambda file: file.last_used):
                if total <= wanted:
                    break
                evicted += self._files.remove(file.name)
                total -= file.nbytes  # whoever removed it
        with self._lock:
            self._seen_nbytes, self._unseen_nbytes = total, 0
        self._tally.add(evictions=evicted)

    def _header(self, name: str) -> Header | None:
        """What a file says it is, if it is an entry."""
        try:
            data = self._files.head(name, _HEAD_NBYTES)
            if data is not None and len(data) == _HEAD_NBYTES and header_nbytes_of(data) > _HEAD_NBYTES:
                data = self._files.head(name, MAX_HEADER_NBYTES)
            return None if data is None else parse_header(data)
        except StoreError as error:
            self._tally.failed(error)
            return None

    def _fault_of(self, name: str) -> StoreError | None:
        try:
            data = self._files.read(name, MAX_HEADER_NBYTES + MAX_PAYLOAD_NBYTES, touch=False)
            if data is not None and not name.startswith(check_entry(data).key.digest.hex()):
                raise StoreError("key", "the entry of another key")
        except StoreError as error:
            return error
        return None
