"""Fetching: what a store has of a prompt becomes pages on the device while the request waits for its turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter

from ...backends.base import PageStage
from ...errors import BackendError
from ...kv.costs import LoadCosts
from ...kv.manager import KvManager
from ...sched.request import RunningSequence
from .config import KvSharingConfig
from .known import KnownChunks
from .workers import Counts, Load, Loader

WAIT_S = 0.005  # of a step that has nothing to do but to wait for what is fetched


class Fetcher:
    """Loads by the sequences that want them. Of those not begun yet some are under way, others wait for room.

    `wake` is called by the loader's thread when something has come.
    """

    def __init__(
        self,
        config: KvSharingConfig,
        stage: PageStage,
        known: KnownChunks,
        costs: LoadCosts,
        counts: Counts,
        wake: Callable[[], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._stage = stage
        self._known = known
        self._costs = costs
        self._counts = counts
        self._wake = wake
        self._news = threading.Event()
        self._begun: dict[int, Load] = {}  # under way or landed; by sequence, as all
        self.loader = Loader(config.store, stage, costs, counts, self._tell, broken)
        self.is_off = False

    def open_books(self, manager: KvManager) -> None:
        """New books: whatever was under way belongs to sequences that begin again."""
        self.abandon()
        self._manager = manager
        self._loads: dict[int, Load] = {}
        self._waiting: deque[tuple[int, Load]] = deque()  # of those, not begun yet
        self._begun = {}
        self._is_awaited = False  # since the last `land` somebody could have started but for a load

    def abandon(self) -> None:
        """Nobody waits for what is under way."""
        for load in tuple(self._begun.values()):
            load.is_over = True

    def welcome(self, sequence: RunningSequence) -> None:
        """A new sequence: fetch what the store has of its prompt, if others have not filled the room for that."""
        load = self._wanted(sequence)
        if load is not None:
            self._loads[sequence.id] = load
            self._waiting.append((sequence.id, load))
            self._begin_waiting()

    def is_ready(self, sequence: RunningSequence) -> bool:
        """Whether a sequence that could start now should: not while what it waits for may still come in time."""
        load = self._loads.get(sequence.id)
        if load is None:
            return True
        if not load.has_begun and self._leader(load) is None:
            self._begin(sequence.id, load)
        if not load.is_settled:
            if not load.has_begun or perf_counter() < load.deadline:
                self._is_awaited = True
                return False
            self._counts.add("miss late")
        self.drop(sequence.id)
        return True

    @property
    def has_news(self) -> bool:
        """A load has brought something, or ended."""
        return self._news.is_set()

    def land(self) -> None:
        """Copy what has been fetched to pages, for a bounded time, and begin further loads."""
        self._is_awaited = False
        if not self._loads:
            return
        self._news.clear()
        start = perf_counter()
        for load in self._begun.values():
            while load.arrivals and not load.is_over:
                if perf_counter() - start > self._config.step_s:
                    self._tell()
                    return
                self._adopt(load)
        while self.loader.missing:
            self._known.forget(self.loader.missing.popleft())
        self._begin_waiting()

    def wait(self) -> bool:
        """The step had nothing to do: wait a moment for what is being fetched. False: nobody waits for anything."""
        if self._is_awaited:
            self._news.wait(WAIT_S)
        return self._is_awaited

    def _wanted(self, sequence: RunningSequence) -> Load | None:
        """What could be fetched for a sequence; None: nothing."""
        manager, config = self._manager, self._config
        if self.is_off:
            return None
        prompt = sequence.tokens[: sequence.prompt_length]
        page_size = config.page_size
        usable = max(len(prompt) - 2, 0) // page_size * page_size
        if usable < config.least_tokens:
            return None
        known = manager.cached_tokens(prompt)
        if usable - known < page_size:
            return None
        keys = [k for k in config.keys(prompt) if known < k.position + k.num_tokens and k.position < usable]
        return Load(prompt, keys, known, usable) if keys else None

    def _begin_waiting(self) -> None:
        """Begin loads in order while pages that were fetched for nobody yet are less than half of all."""
        while self._waiting:
            seq_id, load = self._waiting[0]
            if not load.has_begun and not load.is_over:
                if self._leader(load) is not None or not self._has_room(load):
                    return
                self._begin(seq_id, load)
            self._waiting.popleft()

    def _has_room(self, load: Load) -> bool:
        ahead = sum(other.usable - other.known for other in self._begun.values())
        pool = self._manager.pool
        return not ahead or ahead + load.usable - load.known <= pool.num_pages * pool.page_size // 2

    def _leader(self, load: Load) -> Load | None:
        """A load under way that brings the same chunk first."""
        for other in self._begun.values():
            if not other.is_settled and other.keys[0] == load.keys[0] and perf_counter() < other.deadline:
                return other
        return None

    def _begin(self, seq_id: int, load: Load) -> None:
        """Hand a load to the loader; what the device has got meanwhile is left out."""
        load.known = self._manager.cached_tokens(load.tokens)
        load.keys = [key for key in load.keys if key.position + key.num_tokens > load.known]
        if not load.keys or load.usable <= load.known or self.is_off:
            self.drop(seq_id)
            return
        computing = self._costs.compute_s(load.usable - load.known)
        load.deadline = perf_counter() + min(max(computing, self._config.min_wait_s), self._config.max_wait_s)
        load.has_begun = True
        self._begun[seq_id] = load
        self._counts.add("lookups")
        self.loader.post(load)

    def _adopt(self, load: Load) -> None:
        """The next chunk that has arrived becomes pages; if it cannot, the load is over."""
        key, buffer = load.arrivals.popleft()
        stop = key.position + key.num_tokens
        try:
            found = self._manager.adopt(
                load.tokens[:stop], key.position, lambda first, pages: self._stage.to_device(buffer, pages, first)
            )
        except BackendError as error:
            self._counts.fault("miss copy", "fetched KV could not be copied to the device", error)
            load.is_over = True
            return
        if not found:
            self._counts.add("miss room")
            load.is_over = True
            return
        self._counts.add("loaded tokens", min(stop, load.usable) - max(key.position, load.known))
        self._known.add(key)

    def drop(self, seq_id: int) -> None:
        """A sequence does not wait any more, for whatever reason."""
        self._begun.pop(seq_id, None)
        load = self._loads.pop(seq_id, None)
        if load is not None:
            load.is_over = True
            load.arrivals.clear()

    def switch_off(self) -> None:
        """The store is of no use any more. Any thread may call this."""
        self.is_off = True
        self.abandon()
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._wake()
