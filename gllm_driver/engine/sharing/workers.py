"""The threads that talk to a KV store, so that no step waits for one: a loader and a saver.

They know no pages. What the loader brings stands in host buffers until a step's thread copies it to pages; what the
saver takes away is in a host buffer already.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from ...backends.base import PageStage, StageBuffer
from ...errors import GllmError
from ...kv.costs import LoadCosts, Stretch
from ...kv.store import KvChunkKey, KvEntry, KvStore
from ...kv.store.tiered import TieredStore

log = logging.getLogger("gllm_driver")

BATCH_NBYTES = 32 << 20  # asked of the store at a time, but at least a chunk
NO_BUFFER_S = 0.002  # before the loader looks for a free buffer again


@dataclass(eq=False)
class Load:
    """Chunks wanted for a request: consecutive ones, the last of which ends at token `stop`.

    The loader appends to `arrivals` and sets `is_done`; the stepping thread takes from there, and sets `is_over` when
    nobody waits any more.
    """

    tokens: Sequence[int]  # the prompt
    keys: Sequence[KvChunkKey]
    known: int  # tokens at the start whose KV the device has
    usable: int  # tokens whose KV is of use
    deadline: float = 0.0
    has_begun: bool = False
    arrivals: deque[tuple[KvChunkKey, StageBuffer]] = field(default_factory=deque)
    is_done: bool = False
    is_over: bool = False

    @property
    def is_settled(self) -> bool:
        """Nothing more will come of it."""
        return self.is_over or (self.is_done and not self.arrivals)


class Counts:
    """What happened, by name. Any thread may add. Faults are reported the first time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            self._counter[name] += amount  # type: ignore[assignment]

    def fault(self, name: str, what: str, error: GllmError | OSError | None) -> None:
        with self._lock:
            is_first = name not in self._counter
            self._counter[name] += 1
        if is_first:
            why = "" if error is None else f": {error}"
            log.warning("%s%s; counted from now on, not reported", what, why)

    def all(self) -> dict[str, float]:
        with self._lock:
            return dict(self._counter)


class Worker:
    """A thread that takes jobs in order. An error nobody expected ends it, and is reported once."""

    def __init__(self, name: str, broken: Callable[[BaseException], None]) -> None:
        self._name = name
        self._broken = broken
        self._jobs: deque[object] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_busy = False
        self._thread: threading.Thread | None = None

    def post(self, job: object) -> None:
        """Queue a job; the first one starts the thread."""
        with self._changed:
            if self._is_closing:
                return
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until every job is done; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._is_busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs, forget those not begun, and wait for the one under way; False when that takes longer."""
        with self._changed:
            self._is_closing = True
            self._jobs.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    def run_job(self, job: object) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._jobs or self._is_closing)
                    if self._is_closing:
                        return
                    job = self._jobs.popleft()
                    self._is_busy = True
                self.run_job(job)
                del job  # it may hold a buffer
        except BaseException as error:
            with self._changed:
                self._is_closing, self._is_busy = True, False
                self._jobs.clear()
                self._changed.notify_all()
            self._broken(error)


class Loader(Worker):
    """Looks chunks up, asks the costs, and brings those worth it to host buffers."""

    def __init__(
        self,
        store: KvStore,
        stage: PageStage,
        costs: LoadCosts,
        counts: Counts,
        news: Callable[[], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        super().__init__("gllm-kv-load", broken)
        self._store = store
        tiers = store.tiers if isinstance(store, TieredStore) else (store,)
        self._tiers = {tier.stats().name: tier for tier in tiers}
        self._stage = stage
        self._costs = costs
        self._counts = counts
        self._news = news
        self.missing: deque[bytes] = deque()  # digests that turned out not to be in the store

    def run_job(self, job: object) -> None:
        assert isinstance(job, Load)
        try:
            if not job.is_over:
                self._load(job)
        except (GllmError, OSError) as error:
            self._counts.fault("miss error", "looking for KV in the store failed", error)
        job.is_done = True
        self._news()

    def _load(self, load: Load) -> None:
        tiers = located(self._tiers, load.keys)
        keys = load.keys[: len(tiers)]
        self.missing.extend(key.digest for key in load.keys[len(tiers) :])
        self._counts.add("miss absent", len(load.keys) - len(keys))
        count = self._costs.num_worth_loading(stretches(load, keys, tiers))
        self._counts.add("skipped", len(keys) - count)
        at = 0
        while at < count and not load.is_over:
            tier = tiers[at]
            size = max(1, BATCH_NBYTES // keys[at].payload_nbytes)
            batch = [k for k, t in zip(keys[at : min(at + size, count)], tiers[at:], strict=False) if t == tier]
            start = perf_counter()
            entries = self._store.get(batch)
            seconds = perf_counter() - start
            good = trusted(batch, entries)
            nbytes = sum(entry.nbytes for entry in good)
            if good:
                self._costs.loaded(tier, nbytes, seconds)
            for name, amount in (("chunks", len(good)), ("bytes", nbytes), ("s", seconds)):
                self._counts.add(f"hit {name} {tier}", amount)
            for key, entry in zip(batch, good, strict=False):
                buffer = self._held(load, entry.data)
                if buffer is None:
                    return
                load.arrivals.append((key, buffer))
                self._news()
            at += len(good)
            if len(good) < len(batch):
                self.missing.extend(key.digest for key in batch[len(good) :])
                if len(entries) > len(good):
                    self._counts.fault("miss wrong", "the KV store answered with the KV of something else", None)
                else:
                    self._counts.add("miss gone", len(batch) - len(good))
                return

    def _held(self, load: Load, data: np.ndarray) -> StageBuffer | None:
        """A buffer with these pages, as soon as one is free; None when the load is over before."""
        pause = threading.Event()
        while not load.is_over and not self.is_closing:
            buffer = self._stage.hold(data)
            if buffer is not None:
                return buffer
            pause.wait(NO_BUFFER_S)
        return None


@dataclass(eq=False)
class Save:
    """A chunk in a host buffer."""

    key: KvChunkKey
    buffer: StageBuffer


class Saver(Worker):
    """Puts chunks into the store, those that it does not have."""

    def __init__(self, store: KvStore, counts: Counts, broken: Callable[[BaseException], None]) -> None:
        super().__init__("gllm-kv-save", broken)
        self._store = store
        self._counts = counts

    def run_job(self, job: object) -> None:
        assert isinstance(job, Save)
        try:
            job.buffer.wait()
            if self._store.contains([job.key])[0]:
                self._counts.add("duplicates")
                return
            data = job.buffer.data[: job.key.num_pages].copy()  # the store's own from now on
            data.setflags(write=False)
            del job.buffer  # free for the next chunk
            start = perf_counter()
            self._store.put([KvEntry(job.key, data)])
            for name, amount in (("chunks", 1), ("bytes", data.nbytes), ("s", perf_counter() - start)):
                self._counts.add(f"saved {name}", amount)
        except (GllmError, OSError) as error:
            self._counts.fault("not saved: error", "KV could not be saved", error)


def located(tiers: Mapping[str, KvStore], keys: Sequence[KvChunkKey]) -> list[str]:
    """The fastest tiers that have the first keys, as many as are there without a gap."""
    found: list[str | None] = [None] * len(keys)
    for name, tier in tiers.items():
        missing = [i for i, there in enumerate(found) if there is None]
        for i, there in zip(missing, tier.contains([keys[i] for i in missing]) if missing else (), strict=True):
            found[i] = name if there else None
    return [name for name in found[: found.index(None) if None in found else None] if name is not None]


def stretches(load: Load, keys: Sequence[KvChunkKey], tiers: Sequence[str]) -> list[Stretch]:
    """What each chunk costs and saves."""
    found = []
    for key, tier in zip(keys, tiers, strict=True):
        saved = min(key.position + key.num_tokens, load.usable) - max(key.position, load.known)
        found.append(Stretch(tier, key.payload_nbytes, max(saved, 0)))
    return found


def trusted(keys: Sequence[KvChunkKey], entries: Sequence[KvEntry]) -> list[KvEntry]:
    """The entries that are those of the keys, token by token, up to the first that is not."""
    good: list[KvEntry] = []
    for key, entry in zip(keys, entries, strict=False):
        expected = (key.num_pages, key.root.layout.page_nbytes)
        if entry.key != key or entry.data.dtype != np.uint8 or entry.data.shape != expected:
            break
        good.append(entry)
    return good
