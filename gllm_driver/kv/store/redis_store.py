"""Entries in a Redis server, which expire there, and which anyone with access to it may have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import StoreError
from .base import DAMAGED, SERVER_FAULTS, KvEntry, StoredEntry, StoreStats, Tally, VerifyReport, selected, total_nbytes
from .codec import Codec, check_entry
from .header import MAX_HEADER_NBYTES, MAX_PAYLOAD_NBYTES, Header, header_nbytes_of, parse_header
from .keys import KvChunkKey
from .redis_link import Command, Link

BATCH_NBYTES = 64 << 20  # of values asked for, or sent, at once
MIN_PART_NBYTES = MAX_HEADER_NBYTES
MAX_PART_NBYTES = 512 << 20  # a server takes no longer value, unless it is told to
_SCAN_COUNT = 1000
_HEAD_NBYTES = 4096
_NAME = re.compile(rb"[0-9a-f]{64}(-int[48])*")


class RedisStore:
    """Entries under `<prefix>:kv1:<digest>`. A longer entry than `part_nbytes` lies in several values.

    The first value begins with the header; the others are named after it and the body's checksum, and written before
    it, so that what is found belongs together or is a miss. ttl_s: seconds after which the server forgets an entry that
    nobody put again; 0 leaves that to the server's own eviction.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "redis",
        codec: Codec | None = None,
        namespace: str = "",
        prefix: str = "gllm",
        ttl_s: int = 24 * 3600,
        timeout_s: float = 0.25,
        backoff_s: float = 2.0,
        part_nbytes: int = BATCH_NBYTES,
    ) -> None:
        self._codec = codec or Codec()
        self._namespace = namespace
        self._prefix = f"{prefix}:kv1:".encode()
        self._ttl_s = ttl_s
        self._part_nbytes = min(max(part_nbytes, MIN_PART_NBYTES), MAX_PART_NBYTES)
        self._tally = Tally(name)
        self._link = Link(url, timeout_s, backoff_s, self._tally)

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        found: list[KvEntry] = []
        try:
            while len(found) < len(keys):
                batch = _batch(keys[len(found) :], [self._codec.max_nbytes(key) for key in keys[len(found) :]])
                entries = self._read(batch)
                found += entries
                if len(entries) < len(batch):
                    break
        except StoreError as error:
            self._tally.failed(error)
        self._tally.add(hits=len(found), misses=len(keys) - len(found), read_nbytes=total_nbytes(found))
        return found

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        try:
            replies = self._link.call([(b"EXISTS", self._name(key)) for key in keys]) if keys else []
        except StoreError as error:
            self._tally.failed(error)
            return [False] * len(keys)
        return [reply == 1 for reply in replies]

    def put(self, entries: Sequence[KvEntry]) -> None:
        if not entries:
            return
        try:
            missing = [e for e, kept in zip(entries, self._kept(entries), strict=True) if not kept]
            while missing:
                batch = _batch(missing, [entry.nbytes for entry in missing])
                self._write(batch)
                missing = missing[len(batch) :]
        except StoreError as error:
            self._tally.failed(error)

    def stats(self) -> StoreStats:
        return self._tally.stats()

    def entries(self) -> Iterator[StoredEntry]:
        for name in self._names():
            header = self._head(name)
            if header is not None:
                shown = name[len(self._prefix) :].decode()
                yield StoredEntry.of(header.key, shown, header.total_nbytes, header.created, header.codec)

    def purge(self, *, model: bytes | None = None, older_than_s: float | None = None) -> int:
        if model is None and older_than_s is None:
            names = list(self._names(parts=True))
            return self._delete(names, count=sum(b"." not in name[len(self._prefix) :] for name in names))
        gone = [e.name for e in self.entries() if selected(e, model, older_than_s)]
        return sum(self._remove(self._prefix + name.encode()) for name in gone)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        checked = removed = 0
        bad = []
        try:
            for name in self._names():
                error = self._fault_of(name)
                checked += 1
                if error is not None:
                    shown = name[len(self._prefix) :].decode()
                    bad.append((shown, error.reason, str(error)))
                    removed += repair and error.reason in DAMAGED and self._remove(name)
        except StoreError as error:
            self._tally.failed(error)
        return VerifyReport(checked, tuple(bad), removed)

    def flush(self, timeout_s: float | None = None) -> bool:
        return True

    def close(self) -> None:
        self._link.close()

    def _name(self, key: KvChunkKey) -> bytes:
        return self._prefix + (key.digest.hex() + self._namespace).encode()

    def _read(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        """Entries of the first keys that are there. Raises StoreError when the server fails."""
        limits = [self._codec.max_nbytes(key) for key in keys]
        replies = self._values([(self._name(key), limit) for key, limit in zip(keys, limits, strict=True)])
        found: list[KvEntry] = []
        for key, limit, value in zip(keys, limits, replies, strict=True):
            if value == b"":
                break
            try:
                if isinstance(value, StoreError):
                    raise value
                found.append(self._codec.decode(self._whole(self._name(key), value, limit), key))
            except StoreError as error:
                self._tally.failed(error)
                if error.reason in DAMAGED or value is error:  # a value of another type is damage as well
                    self._remove(self._name(key))
                break
        return found

    def _whole(self, name: bytes, first: bytes, limit: int) -> bytes:
        """A value and the parts that follow it, together no longer than `limit`. Raises StoreError."""
        header = parse_header(memoryview(first))
        parts = _parts(name, header, len(first))
        if not parts or header.total_nbytes > limit:
            return first  # whole, or not what it should be, which decoding finds
        chunks = [first]
        while parts:
            batch = _batch(parts, [len(first)] * len(parts))
            for reply in self._values([(part, len(first)) for part in batch]):
                if isinstance(reply, StoreError):
                    raise reply
                chunks.append(reply)
            parts = parts[len(batch) :]
        return b"".join(chunks)

    def _values(self, wanted: Sequence[tuple[bytes, int]]) -> list[Any]:
        """The values under names, empty where there is none, cut one byte above their limits."""
        commands: list[Command] = [(b"GETRANGE", name, 0, limit) for name, limit in wanted]
        replies = self._link.call(commands, nbytes=sum(limit + 1 for _, limit in wanted))
        return [
            reply if isinstance(reply, (bytes, StoreError)) else StoreError("reply", "not a string")
            for reply in replies
        ]

    def _kept(self, entries: Sequence[KvEntry]) -> list[bool]:
        """Which are there already; they live on for another TTL."""
        names = [self._name(entry.key) for entry in entries]
        replies = self._link.call(
            [(b"EXPIRE", name, self._ttl_s) if self._ttl_s else (b"EXISTS", name) for name in names]
        )
        return [reply == 1 for reply in replies]

    def _write(self, entries: Sequence[KvEntry]) -> None:
        commands: list[Command] = []
        ends: list[int] = []  # index of the command that completes each entry
        entries = [entry for entry in entries if not self._is_oversize(entry)]
        for entry in entries:
            value = memoryview(b"".join(self._codec.encode(entry)))
            name, size = self._name(entry.key), self._part_nbytes
            parts = _parts(name, parse_header(value), size)
            expiry = (b"EX", self._ttl_s) if self._ttl_s else ()
            for i, part in enumerate(parts, 1):
                commands.append((b"SET", part, value[i * size : (i + 1) * size], *expiry))
            commands.append((b"SET", name, value[:size], *expiry))
            ends.append(len(commands) - 1)
        replies = self._link.call(commands)
        failed = [reply for reply in replies if isinstance(reply, StoreError)]
        for error in failed:
            self._tally.failed(error)
        written = [entry for entry, end in zip(entries, ends, strict=True) if not isinstance(replies[end], StoreError)]
        self._tally.add(puts=len(written), written_nbytes=total_nbytes(written))

    def _is_oversize(self, entry: KvEntry) -> bool:
        if entry.nbytes <= MAX_PAYLOAD_NBYTES:
            return False
        self._tally.fault("oversize", f"a chunk of {entry.nbytes} bytes, the format ends at {MAX_PAYLOAD_NBYTES}")
        return True

    def _names(self, *, parts: bool = False) -> Iterator[bytes]:
        """Names of entries on the server; a failure ends the list, and is counted."""
        cursor: Any = 0
        seen: set[bytes] = set()
        try:
            while True:
                reply = self._link.call(
                    [(b"SCAN", cursor, b"MATCH", self._prefix + b"*", b"COUNT", _SCAN_COUNT)], nbytes=1 << 20
                )[0]
                if isinstance(reply, StoreError):
                    raise reply
                if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[1], list):
                    raise StoreError("reply", "a list of names that is none")
                cursor, names = reply
                for name in names:
                    if isinstance(name, bytes) and name not in seen and name.startswith(self._prefix):
                        seen.add(name)
                        rest = name[len(self._prefix) :]
                        if _NAME.fullmatch(rest) or (parts and _NAME.fullmatch(rest.partition(b".")[0])):
                            yield name
                if cursor in (0, b"0"):
                    return
        except StoreError as error:
            self._tally.failed(error)

    def _head(self, name: bytes) -> Header | None:
        """What a value says it is, if it is an entry."""
        try:
            value = self._start(name, _HEAD_NBYTES)
            if len(value) == _HEAD_NBYTES and header_nbytes_of(value) > _HEAD_NBYTES:
                value = self._start(name, MAX_HEADER_NBYTES)
            return parse_header(memoryview(value)) if value else None
        except StoreError as error:
            self._tally.failed(error)
            return None

    def _start(self, name: bytes, nbytes: int) -> bytes:
        """The first bytes of a value. Raises StoreError."""
        value = self._values([(name, nbytes - 1)])[0]
        if isinstance(value, StoreError):
            raise value
        return bytes(value)

    def _fault_of(self, name: bytes) -> StoreError | None:
        """What is wrong with an entry, if anything. Raises StoreError when the server fails."""
        value = self._values([(name, MAX_HEADER_NBYTES + MAX_PAYLOAD_NBYTES)])[0]
        if value == b"":
            return None  # gone meanwhile
        try:
            if isinstance(value, StoreError):
                raise value
            header = check_entry(self._whole(name, value, MAX_HEADER_NBYTES + MAX_PAYLOAD_NBYTES))
            if not name[len(self._prefix) :].startswith(header.key.digest.hex().encode()):
                raise StoreError("key", "the entry of another key")
        except StoreError as error:
            if error.reason in SERVER_FAULTS:
                raise
            return error
        return None

    def _remove(self, name: bytes) -> bool:
        """Remove an entry and its parts."""
        head = self._head(name)
        names = [name]
        if head is not None and head.total_nbytes > MIN_PART_NBYTES:
            try:
                first = self._link.call([(b"STRLEN", name)])[0]
            except StoreError as error:
                self._tally.failed(error)
                return False
            if isinstance(first, int) and first >= MIN_PART_NBYTES:
                names += _parts(name, head, first)
        return self._delete(names, count=1) > 0

    def _delete(self, names: Sequence[bytes], *, count: int) -> int:
        """Delete values; `count` if that worked, else 0."""
        try:
            for start in range(0, len(names), _SCAN_COUNT):
                self._link.call([(b"DEL", name) for name in names[start : start + _SCAN_COUNT]])
        except StoreError as error:
            self._tally.failed(error)
            return 0
        return count


def _parts(name: bytes, header: Header, size: int) -> list[bytes]:
    """Names of the values after the first, if an entry is stored in values of `size` bytes."""
    count = -(-header.total_nbytes // size) - 1 if size >= MIN_PART_NBYTES else 0
    return [b"%s.%s.%d" % (name, header.checksum[:8].hex().encode(), i) for i in range(1, count + 1)]


def _batch(items: Sequence[Any], sizes: Sequence[int]) -> Sequence[Any]:
    """The first items, one at least, that together have no more than BATCH_NBYTES."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if count and total > BATCH_NBYTES:
            return items[:count]
    return items
