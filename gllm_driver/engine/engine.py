"""The engine: requests from any thread, steps run by whoever waits."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np

from ..backends.base import Backend, KvCacheHandle, WeightsHandle
from ..config import KvCacheConfig
from ..errors import CapacityError, GllmError, RequestError
from ..kv.distill import Rope
from ..kv.manager import KvManager
from ..kv.pages import PagePool
from ..metrics import Metrics
from ..sched.request import Request, RunningSequence
from ..sched.scheduler import Scheduler
from .config import EngineConfig
from .core import Core, LogitsVisitor, WholeForward
from .handle import RequestHandle


class Engine:
    """One model on one backend, serving any number of requests.

    Requests are submitted from any thread. Steps are run by whoever waits for a token (`RequestHandle`), by `step`, or
    by an `AsyncEngine`'s thread: one at a time, each for all requests. There is no thread unless somebody makes one.

    root_key: identity of weights, dtype and KV format, for prefix reuse beyond this object's life.
    """

    def __init__(
        self,
        backend: Backend,
        weights: WeightsHandle,
        kv: KvCacheConfig,
        context_length: int,
        config: EngineConfig | None = None,
        root_key: bytes = b"",
    ) -> None:
        self.backend = backend
        self.weights = weights
        self.context_length = context_length
        self.kv: KvCacheHandle = backend.alloc_kv_cache(kv)
        self._core = Core(backend, weights, self.kv, config or EngineConfig(), root_key)
        self._mailbox = self._core.mailbox
        self._ids = itertools.count()
        self._is_closed = False
        self._stepping = threading.Lock()  # held by whoever runs a step
        self._stepped = threading.Condition()  # a step has ended; guards _num_waiting
        self._num_waiting = 0
        self.work = threading.Event()  # set when a request comes, for a thread that sleeps while there are none

    # ---- requests; any thread

    def check(self, request: Request) -> None:
        """Raise RequestError or CapacityError if the request can never be run. Nothing is reserved."""
        self.check_tokens(request.tokens)
        if len(request.tokens) >= self.context_length:
            raise CapacityError(
                f"the prompt has {len(request.tokens)} tokens and leaves no room in a context of "
                f"{self.context_length}: shorten it or load the model with a larger context"
            )
        wanted = len(request.tokens) + self._max_output(request) - 1  # the last token's KV is never needed
        if self.pool.pages_for(wanted) > self.pool.num_pages:
            raise CapacityError(
                f"a prompt of {len(request.tokens)} tokens and {self._max_output(request)} more need "
                f"{self.pool.pages_for(wanted)} KV pages of {self.pool.page_size}, the device has "
                f"{self.pool.num_pages}: ask for fewer tokens or load the model with a larger context"
            )

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for an empty prompt or an id outside the vocabulary."""
        if not len(tokens):
            raise RequestError("the prompt is empty: give at least one token")
        vocab_size = self.weights.vocab_size
        if min(tokens) >= 0 and max(tokens) < vocab_size:
            return
        i, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < vocab_size)
        raise RequestError(f"token {i} of the prompt is {token}, outside the vocabulary of {vocab_size}")

    def submit(self, request: Request) -> RequestHandle:
        """Queue a request. Raises what `check` raises."""
        if self._is_closed:
            raise RequestError("the model is closed: load it again")
        self.check(request)
        now = perf_counter()
        sequence = RunningSequence(
            id=next(self._ids),
            request=request,
            tokens=list(request.tokens),
            prompt_length=len(request.tokens),
            max_output=self._max_output(request),
            submitted_at=now,
            deadline=None if request.deadline_s is None else now + request.deadline_s,
        )
        self._mailbox.post(sequence)
        self.work.set()
        return RequestHandle(self, sequence)

    def cancel(self, sequence: RunningSequence) -> None:
        """End a sequence's request: now, or with the step that is running. Safe in finalizers."""
        if sequence.progress.finish_reason is None:
            self._mailbox.post_cancel(sequence)
            self._wake()

    def _max_output(self, request: Request) -> int:
        return min(request.max_tokens, self.context_length - len(request.tokens))

    # ---- who runs steps

    # The lock is taken by `with` alone, so Ctrl-C cannot leave it locked; `locked` keeps those who would wait for it in
    # _wait, from where they see their tokens whoever steps next.

    def advance(self, sequence: RunningSequence, seen: int) -> None:
        """Return when the sequence has more than `seen` tokens, or has ended; run steps meanwhile if nobody else is."""
        tokens, progress = sequence.tokens, sequence.progress
        while len(tokens) <= seen and progress.finish_reason is None:
            if self._stepping.locked():
                self._wait(lambda: len(tokens) > seen or progress.finish_reason is not None)
                continue
            try:
                with self._stepping:
                    if len(tokens) <= seen and progress.finish_reason is None:
                        self._core.step()
            finally:
                if self._num_waiting or self._mailbox.has_mail:
                    self._wake()

    def step(self) -> bool:
        """Run one step for all requests. False: there was nothing to do."""
        try:
            with self._stepping:
                return self._core.step()
        finally:
            self._wake()

    def _wait(self, satisfied: Callable[[], bool]) -> None:
        """Sleep until the step that another thread is running has ended."""
        with self._stepped:
            self._num_waiting += 1
            try:
                # Whoever holds the lock looks at _num_waiting after letting go, so this sleep has an end.
                if self._stepping.locked() and not satisfied():
                    self._stepped.wait()
            finally:
                self._num_waiting -= 1

    def _wake(self) -> None:
        """See to cancellations, unless a step is running: then whoever runs it will. Let others go on."""
        while self._mailbox.cancelled and not self._stepping.locked():
            with self._stepping:
                self._core.absorb()
        if self._num_waiting:
            with self._stepped:
                self._stepped.notify_all()

    def close(self) -> None:
        """End every request as cancelled, and take no more. The backend may be closed then."""
        self._is_closed = True
        with self._stepping:
            self._core.end_all("cancelled")
        self._wake()
        if self._core.sharing is not None:
            self._core.sharing.close()

    def fail_all(self, error: GllmError) -> None:
        """End every request with an error, as when the thread that ran the steps dies."""
        with self._stepping:
            self._core.end_all("error", error)
        self._wake()

    # ---- looking in

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of a sequence: f32 [T, vocab]. Running requests yield their pages if need be."""
        parts: list[np.ndarray] = []
        self.read_logits([tokens], lambda _sequence, _position, logits: parts.append(logits))
        return np.concatenate(parts)

    def read_logits(self, sequences: Sequence[Sequence[int]], visit: LogitsVisitor, first: int = 0) -> None:
        """Show the logits of sequences of one length from position `first` on, piece by piece in their order.

        All of the sequences are in the KV cache together while this lasts (`sequences_at_once` says how many are
        worth it), and no request goes on. Running requests yield their pages if need be.
        """
        for tokens in sequences:
            self.check_tokens(tokens)
            if len(tokens) > self.context_length:
                raise CapacityError(f"{len(tokens)} tokens do not fit in a context of {self.context_length}")
        ids = [next(self._ids) for _ in sequences]
        try:
            with self._stepping:
                self._core.read_logits(sequences, ids, first, visit)
        finally:
            self._wake()

    def compute_whole(self, sequences: Sequence[Sequence[int]], compute: WholeForward) -> np.ndarray:
        """What `compute` gives for whole sequences, rows in their order: as many at a time as there are pages for.

        Meanwhile no request goes on. Raises RequestError, CapacityError.
        """
        for tokens in sequences:
            self.check_tokens(tokens)
            if len(tokens) > self.context_length:
                raise CapacityError(f"{len(tokens)} tokens do not fit in a context of {self.context_length}")
        found: list[np.ndarray] = []
        try:
            for group in _fitting(sequences, self._core.pool):
                with self._stepping:
                    found.append(self._core.compute_whole(group, [next(self._ids) for _ in group], compute))
        finally:
            self._wake()
        return np.concatenate(found)

    def sequences_at_once(self, length: int, first: int) -> int:
        """How many sequences of so many tokens `read_logits` takes with profit."""
        return self._core.sequences_at_once(length, first)

    @property
    def metrics(self) -> Metrics:
        """Counts and timings so far. Read while a step runs, they may be one step apart from each other."""
        return self._core.metrics()

    @property
    def rope(self) -> Rope | None:
        """How the model rotates keys."""
        return self._core.config.rope

    @property
    def pool(self) -> PagePool:
        """The device's pages."""
        return self._core.pool

    @property
    def manager(self) -> KvManager:
        """Which sequence has which pages."""
        return self._core.manager

    @property
    def scheduler(self) -> Scheduler:
        """Who is computed next."""
        return self._core.scheduler

    def audit(self) -> None:
        """Raise AssertionError unless the books agree with each other. Between steps only."""
        self._core.audit()


def _fitting(sequences: Sequence[Sequence[int]], pool: PagePool) -> Iterator[list[Sequence[int]]]:
    """The sequences in order, as many at a time as the device's pages hold together."""
    group: list[Sequence[int]] = []
    left = pool.num_pages
    for tokens in sequences:
        pages = pool.pages_for(len(tokens))
        if group and pages > left:
            yield group
            group, left = [], pool.num_pages
        group.append(tokens)
        left -= pages
    if group:
        yield group
