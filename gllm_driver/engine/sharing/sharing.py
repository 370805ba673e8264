"""What the engine calls: fetching before a sequence starts, saving while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...backends.base import Backend, KvCacheHandle, WeightsHandle
from ...kv.costs import LoadCosts
from ...kv.manager import KvManager
from ...metrics import StoreMetrics
from ...sched.plan import StepPlan
from ...sched.request import RunningSequence
from .config import KvSharingConfig
from .fetch import Fetcher
from .known import KnownChunks
from .save import Saving
from .workers import Counts, Saver

log = logging.getLogger("gllm_driver")

MIN_MEASURED_TOKENS = 16  # of a step whose time tells what prefill takes


class KvSharing:
    """The stepping thread's side of it. `wake` is called by other threads when something has been fetched."""

    def __init__(
        self,
        backend: Backend,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        config: KvSharingConfig,
        wake: Callable[[], None],
    ) -> None:
        """Raises CapacityError when there is no memory for the buffers."""
        self._config = config
        self._counts = Counts()
        self.costs = _start_costs(backend, weights, always=config.load_always)
        self._stages = [backend.page_stage(kv, config.chunk_pages, config.num_buffers) for _ in range(2)]
        out, back = self._stages
        known = KnownChunks()
        self._saver = Saver(config.store, self._counts, self._break)
        self.fetcher = Fetcher(config, back, known, self.costs, self._counts, wake, self._break)
        self.saving = Saving(config, out, known, self._counts, self._saver)

    def open_books(self, manager: KvManager) -> None:
        """Everything about pages is new."""
        self.fetcher.open_books(manager)
        self.saving.open_books(manager)

    def end(self, sequence: RunningSequence) -> None:
        """A sequence is over; its pages are still its own."""
        self.fetcher.drop(sequence.id)
        self.saving.end(sequence)

    def learn(self, plan: StepPlan, seconds: float) -> None:
        """A step has run: what computing prompts takes here."""
        num_tokens = sum(piece.length for piece in plan.pieces if piece.length > 1)
        if num_tokens >= MIN_MEASURED_TOKENS:
            self.costs.computed(num_tokens, seconds)

    def metrics(self) -> StoreMetrics:
        """Counts so far. Any thread may ask."""
        return StoreMetrics.of(self._counts.all())

    def close(self) -> None:
        """Save what waits, for a moment at most, and end the threads. No sequence is left."""
        self.fetcher.abandon()
        self._saver.flush(self._config.flush_s)
        have_ended = [worker.close(self._config.flush_s) for worker in (self.fetcher.loader, self._saver)]
        if all(have_ended):  # otherwise a thread may still use the buffers, and they stay
            for stage in self._stages:
                stage.close()

    def _break(self, error: BaseException) -> None:
        """A thread has met an error that a store must not raise: do without the store from now on."""
        self._counts.add("failed threads")
        log.warning("the KV store failed with %s: %s; it is no longer used", type(error).__name__, error)
        self.saving.is_off = True
        self.fetcher.switch_off()


def _start_costs(backend: Backend, weights: WeightsHandle, *, always: bool) -> LoadCosts:
    """Estimates before anything was measured: 2 operations a parameter and token, at a usual speed."""
    num_params = sum(tensor.num_rows * tensor.shape[-1] for tensor in weights.tensors.values() if len(tensor.shape) > 1)
    is_host = backend.maps_weights
    token_s = 2 * num_params / (5e10 if is_host else 2e14)
    return LoadCosts(token_s, 1 / (5e9 if is_host else 4e10), always=always)
