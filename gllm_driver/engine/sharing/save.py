"""Saving: pages that have become full are copied beside the steps and put into a store by a thread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

from ...backends.base import PageStage
from ...errors import BackendError
from ...kv.manager import KvManager
from ...kv.store import KvChunkKey
from ...sched.request import RunningSequence
from .config import KvSharingConfig
from .known import KnownChunks
from .workers import Counts, Save, Saver


@dataclass(eq=False)
class _Saved:
    """How far a sequence has got with saving."""

    last_key: KvChunkKey | None = None  # of the last whole chunk
    num_tokens: int = 0  # in whole chunks
    has_tail: bool = False  # the end of the prompt is saved as well
    is_over: bool = False  # after a failure nothing more is saved


class Saving:
    """How far each sequence has got, and who takes it further."""

    def __init__(
        self,
        config: KvSharingConfig,
        stage: PageStage,
        known: KnownChunks,
        counts: Counts,
        saver: Saver,
    ) -> None:
        self._config = config
        self._stage = stage
        self._known = known
        self._counts = counts
        self._saver = saver
        self.is_off = False

    def open_books(self, manager: KvManager) -> None:
        """New books: every sequence begins again."""
        self._manager = manager
        self._saved: dict[int, _Saved] = {}

    def save(self, sequences: Iterable[RunningSequence]) -> None:
        """Take copies of chunks that have become full, as many as there are buffers, for a bounded time."""
        start = perf_counter()
        for sequence in sequences:
            while perf_counter() - start < self._config.step_s and self._save_next(sequence, is_last=False):
                pass

    def end(self, sequence: RunningSequence) -> None:
        """A sequence is over; its pages are still its own. Copy what has not been saved, if there are buffers."""
        if sequence.has_kv and sequence.error is None:
            start = perf_counter()
            while perf_counter() - start < self._config.step_s and self._save_next(sequence, is_last=True):
                pass
        self._saved.pop(sequence.id, None)

    def _save_next(self, sequence: RunningSequence, *, is_last: bool) -> bool:
        """Save the next chunk of a sequence. False: there is none now, or no buffer."""
        manager, config = self._manager, self._config
        saved = self._saved.setdefault(sequence.id, _Saved())
        if saved.is_over or self.is_off:
            return False
        stop = self._next_stop(sequence, saved)
        if stop is None or not manager.is_resident(sequence.id) or not manager.is_exact(sequence.id):
            return False
        key = KvChunkKey.after(config.root, saved.last_key, sequence.tokens[saved.num_tokens : stop])
        if key not in self._known:
            buffer = self._stage.take()
            if buffer is None:
                self._counts.add("not saved: busy", is_last)
                return False
            page_size = config.page_size
            pages = manager.pages(sequence.id)[saved.num_tokens // page_size : stop // page_size]
            try:
                self._stage.to_host(pages, buffer)
            except BackendError as error:
                self._counts.fault("not saved: copy", "KV could not be copied from the device and is not saved", error)
                saved.is_over = True
                return False
            self._saver.post(Save(key, buffer))
            self._known.add(key)
        if key.num_tokens == config.chunk_tokens:
            saved.last_key, saved.num_tokens = key, stop
        else:
            saved.has_tail = True
        return True

    def _next_stop(self, sequence: RunningSequence, saved: _Saved) -> int | None:
        """Where the next chunk to be saved ends, if it is full; that of a prompt's end when the prompt is computed."""
        config = self._config
        stop = saved.num_tokens + config.chunk_tokens
        if stop <= sequence.num_shared:
            return stop
        page_size = config.page_size
        end = sequence.prompt_length // page_size * page_size
        least = config.least_tokens
        if not saved.has_tail and saved.num_tokens + least <= end <= sequence.num_shared and end < stop:
            return end
        return None
