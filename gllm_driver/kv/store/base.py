"""What every KV store offers, what it hands out, and what it counts."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...errors import StoreError
from .keys import KvChunkKey

log = logging.getLogger("gllm_driver.kv.store")

# Why a lookup was a miss although something was there, or why something was not stored.
REASONS = {
    "truncated": "fewer or more bytes than the header says",
    "magic": "not an entry of this format",
    "version": "an entry of another version of the format",
    "header": "header fields that are out of range or contradict each other",
    "checksum": "the bytes changed since they were written",
    "model": "KV of another model, dtype, context or layout",
    "key": "the entry of another key",
    "tokens": "the KV of other token ids",
    "dims": "another number of pages, or other sizes of a page",
    "quantization": "quantized in another way than this store accepts",
    "compression": "a compressed body that cannot be unpacked here",
    "oversize": "more bytes than the store takes",
    "full": "no room left",
    "dropped": "more waited to be written back than the queue takes",
    "io": "the operating system reported an error",
    "timeout": "the server did not answer in time",
    "unreachable": "no connection to the server",
    "auth": "the server refused the user or password",
    "reply": "an answer that makes no sense",
    "down": "not asked, since the server failed a moment ago",
}
# Reasons to throw an entry away: under its name nothing useful will ever be found.
DAMAGED = frozenset({"truncated", "magic", "header", "checksum", "model", "key", "tokens", "dims"})
# Reasons that say something of a server, and nothing of an entry.
SERVER_FAULTS = frozenset({"timeout", "unreachable", "auth", "reply", "down"})


@dataclass(frozen=True, eq=False)
class KvEntry:
    """The KV of one chunk: bytes [num_pages, page_nbytes], which never change once they are in here."""

    key: KvChunkKey
    data: np.ndarray = field(repr=False)  # u8 [num_pages, page_nbytes], C-contiguous
    created: float = 0.0  # seconds since 1970; 0: when it is put
    sealed: bool = False  # nobody else can write to the array's memory

    def __post_init__(self) -> None:
        expected = (self.key.num_pages, self.key.root.layout.page_nbytes)
        if self.data.dtype != np.uint8 or self.data.shape != expected or not self.data.flags.c_contiguous:
            raise ValueError(f"KV of {self.key} is u8 {expected}, contiguous; got {self.data.dtype} {self.data.shape}")

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.key.tokens

    @property
    def dtype(self) -> str:
        return self.key.root.layout.dtype

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return self.key.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def array(self) -> np.ndarray:
        """The same memory as numbers [pages, layers, 2, kv_heads, page_size, head_dim]."""
        return self.data.reshape(-1).view(numpy_dtype(self.dtype)).reshape(self.shape)

    def frozen(self) -> KvEntry:
        """An entry nobody can write to: this one where that is known, else a copy."""
        if self.sealed or (self.data.flags.owndata and not self.data.flags.writeable):
            return self
        copy = self.data.copy()
        copy.setflags(write=False)
        return KvEntry(self.key, copy, self.created, sealed=True)


def numpy_dtype(name: str) -> np.dtype:
    """The type numpy knows f32, f16 and bf16 by."""
    if name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"f32": "<f4", "f16": "<f2"}[name])


@dataclass(frozen=True)
class StoreStats:
    """Counters of one store since it was opened. Keys are counted, not calls; bytes are of KV as the caller sees it."""

    name: str
    num_entries: int | None = None  # None: not known without asking for it
    nbytes: int | None = None
    capacity_nbytes: int | None = None
    hits: int = 0
    misses: int = 0
    puts: int = 0  # entries written
    evictions: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)  # by reason (REASONS)
    tiers: tuple[StoreStats, ...] = ()  # L1, L2, …

    @property
    def hit_rate(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


@dataclass(frozen=True)
class StoredEntry:
    """What a header says about an entry, for listing."""

    name: str
    model: bytes
    root: bytes
    dtype: str
    num_tokens: int
    position: int
    payload_nbytes: int
    stored_nbytes: int
    created: float
    codec: str

    @classmethod
    def of(cls, key: KvChunkKey, name: str, stored_nbytes: int, created: float, codec: str) -> StoredEntry:
        root = key.root
        return cls(
            name=name,
            model=root.model,
            root=root.digest,
            dtype=root.layout.dtype,
            num_tokens=key.num_tokens,
            position=key.position,
            payload_nbytes=key.payload_nbytes,
            stored_nbytes=stored_nbytes,
            created=created,
            codec=codec,
        )


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every entry found: names of bad ones with the reason and what exactly is wrong."""

    num_checked: int
    bad: tuple[tuple[str, str, str], ...] = ()
    num_removed: int = 0


class KvStore(Protocol):
    """A cache of KV by key, safe to use from several threads.

    No method raises for a fault of the store: the result is a miss, a counter by reason, and one warning per reason.
    """

    def get(self, keys: Sequence[KvChunkKey]) -> list[KvEntry]:
        """Entries of the first keys, as many as are there without a gap; entry i is of keys[i]. Read-only arrays."""

    def contains(self, keys: Sequence[KvChunkKey]) -> list[bool]:
        """Whether each is probably there. Reads no bodies; a later `get` may still miss."""

    def put(self, entries: Sequence[KvEntry]) -> None:
        """Keep entries, if there is room. Those already there stay as they are.

        An array that is not read-only and owner of its memory is copied first, so it may be reused afterwards.
        """

    def stats(self) -> StoreStats: ...

    def entries(self) -> Iterator[StoredEntry]:
        """Every entry, in no order."""

    def purge(self, *, model: bytes | None = None, older_than_s: float | None = None) -> int:
        """Remove entries, all or those of a model (digest, or its beginning) and an age; returns how many."""

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Check every entry, and with `repair` remove the bad ones."""

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything put so far is written; False when that takes longer."""

    def close(self) -> None:
        """Write what waits, for a moment at most, and give everything back."""


class Tally:
    """A store's counters. Thread-safe; warns once per reason."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()

    def add(self, **amounts: int) -> None:
        """Add to counters named as the fields of StoreStats."""
        with self._lock:
            self._counts.update(amounts)

    def fault(self, reason: str, detail: object, count: int = 1) -> None:
        with self._lock:
            first = reason not in self._faults
            self._faults[reason] += count
        if first:
            log.warning("KV store %s: %s (%s); counted from now on, not reported", self.name, REASONS[reason], detail)

    def failed(self, error: StoreError) -> None:
        self.fault(error.reason, error)

    def stats(self, **more: int | None) -> StoreStats:
        with self._lock:
            return StoreStats(self.name, faults=dict(self._faults), **dict(self._counts), **more)  # type: ignore[arg-type]


def selected(entry: StoredEntry, model: bytes | None, older_than_s: float | None, now: float | None = None) -> bool:
    """Whether a purge with these limits takes the entry."""
    if model is not None and not entry.model.startswith(model):
        return False
    return older_than_s is None or (time.time() if now is None else now) - entry.created > older_than_s


def total_nbytes(entries: Iterable[KvEntry]) -> int:
    return sum(entry.nbytes for entry in entries)
