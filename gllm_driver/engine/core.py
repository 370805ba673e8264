"""Steps, one at a time: plan → forward → sample → commit → emit. Errors end requests, not the engine."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from ..backends.base import Backend, KvCacheHandle, WeightsHandle
from ..errors import CapacityError, GllmError
from ..kv.manager import KvManager
from ..kv.pages import PagePool
from ..metrics import Metrics, Recorder
from ..sched.plan import Piece
from ..sched.request import RunningSequence
from ..sched.scheduler import Counters, Scheduler
from ..types import BatchInput, SequenceInput
from .config import EngineConfig
from .distill import BackendMerger
from .mailbox import Deadlines, Mailbox
from .outcomes import Outcomes
from .runner import Result, Runner
from .sharing import KvSharing
from .swap import Swapper

LOGITS_CHUNK = 256  # tokens of one step whose logits are all read

LogitsVisitor = Callable[[int, int, np.ndarray], None]
"""Told of logits: (index of the sequence, position of the first row, f32 [n, vocab])."""

WholeForward = Callable[[Backend, WeightsHandle, KvCacheHandle, BatchInput], np.ndarray]
"""A forward pass over whole sequences, whose result has a row for each."""


class _Doubt(enum.IntEnum):
    """What an interrupt (Ctrl-C) in the middle of a step may have left half done."""

    NONE = 0
    LOOP = 1  # the backend: the decode loop may be ahead of the tokens taken from it
    PAGES = 2  # the books: lists of sequences and pages


class Core:
    """The one owner of sequences, pages and the decode loop. One thread at a time may be inside.

    Other threads post to its `mailbox`.
    """

    def __init__(
        self, backend: Backend, weights: WeightsHandle, kv: KvCacheHandle, config: EngineConfig, root_key: bytes
    ) -> None:
        self.backend = backend
        self.weights = weights
        self.kv = kv
        self.config = config
        self._root_key = root_key
        self.swapper = Swapper(backend, kv, config.swap)
        self._recorder = Recorder()
        self._outcomes = Outcomes(self._recorder)
        self._counters = Counters()

        self.mailbox = Mailbox()
        self.sharing: KvSharing | None = None
        if config.kv_sharing is not None:
            self.sharing = KvSharing(backend, weights, kv, config.kv_sharing, self.mailbox.knock)
        self._deadlines = Deadlines()
        self._doubt = _Doubt.NONE
        self._rows: list[RunningSequence] = []  # of the decode loop
        self._free_steps = 0  # steps of the decode loop that need no plan
        self.open_books()

    def open_books(self) -> None:
        """Everything about pages and order, new: no sequence holds anything."""
        config = self.kv.config
        self.pool = PagePool(config.num_pages, config.page_size)
        self.manager = KvManager(
            self.pool,
            self.swapper,
            self.config.swap,
            num_host_slots=self.swapper.num_slots,
            root_key=self._root_key,
            clock=perf_counter,
            prefix_reuse=self.config.prefix_reuse,
            merger=self._merger(),
        )
        self.kv.tracker = self.manager
        self.scheduler = Scheduler(self.manager, self.config.scheduler, lambda: self.pool.num_available)
        self.scheduler.counters = self._counters
        if self.sharing is not None:
            self.sharing.open_books(self.manager)
            self.scheduler.is_ready = self.sharing.fetcher.is_ready
        self._runner = Runner(self.backend, self.weights, self.kv, self.manager.pages)

    # ---- one step

    def step(self) -> bool:
        """Run one step for all requests. False: there was nothing to do."""
        if self.mailbox.has_mail or self._doubt:
            self.absorb()
        if self._free_steps:
            self._free_steps -= 1
            self._decode()
        elif not self.scheduler.is_idle:
            self._plan_and_run()
        else:
            return False
        if self._outcomes.ended:
            self._bury()
        self._doubt = _Doubt.NONE
        return True

    def _plan_and_run(self) -> None:
        if self._deadlines:
            self._end_overdue(perf_counter())
            if self._outcomes.ended:
                return
        self._doubt = _Doubt.PAGES
        if self.sharing is not None:
            self.sharing.fetcher.land()
        plan = self.scheduler.plan()
        if self.sharing is not None:
            self.sharing.saving.save(self.scheduler.running)
        if not plan.pieces:
            self._doubt = _Doubt.NONE
            if self.sharing is None or not self.sharing.fetcher.wait():
                self._refuse_first()
            return
        self._doubt = _Doubt.LOOP
        start = perf_counter()
        results = self._runner.run(plan)
        now = perf_counter()
        self._recorder.steps += 1
        if self.sharing is not None:
            self.sharing.learn(plan, now - start)
        for piece, result in zip(plan.pieces, results, strict=True):
            self._outcomes.commit(piece, result, now, now - start)
        if self._runner.loop is not None:
            self._rows = [piece.sequence for piece in plan.pieces]
            pages, page_size = self.manager.pages, self.pool.page_size
            self._free_steps = max(min(len(pages(s.id)) * page_size - s.num_computed for s in self._rows), 0)

    def _decode(self) -> None:
        """A step of the decode loop whose members have room for it: nothing to plan."""
        loop = self._runner.loop
        assert loop is not None
        self._doubt = _Doubt.LOOP
        start = perf_counter()
        try:
            results: Sequence[Result] = loop.step()
        except GllmError as error:
            self._runner.close()
            self._free_steps = 0
            results = self._runner.one_by_one([Piece(s, s.num_computed, 1) for s in self._rows], error)
        now = perf_counter()
        self._recorder.steps += 1
        if self._deadlines:
            self._end_overdue(now)
        for sequence, result in zip(self._rows, results, strict=True):
            if type(result) is int:
                self._outcomes.take(sequence, result, now, now - start)
                sequence.num_computed += 1
            elif isinstance(result, GllmError):
                self._outcomes.end(sequence, "error", result)

    # ---- ends

    def _bury(self) -> None:
        """Give back what ended requests hold. The decode loop had them as members, or may now have room for others."""
        self._doubt = _Doubt.PAGES
        self._runner.close()
        self._free_steps = 0
        while self._outcomes.ended:
            sequence = self._outcomes.ended[-1]
            if sequence.has_kv and sequence.error is None:
                self.scheduler.share(sequence)
            if self.sharing is not None:
                self.sharing.end(sequence)
            self.scheduler.remove(sequence)
            self.mailbox.live.pop(sequence.id, None)
            self._outcomes.ended.pop()
        if self.scheduler.is_idle:
            self._deadlines.clear()

    def _end_overdue(self, now: float) -> None:
        for sequence in self._deadlines.overdue(now):
            self._outcomes.end(sequence, "deadline")

    def _refuse_first(self) -> None:
        """Nothing can be computed though something waits: end whoever ranks first rather than wait for ever."""
        sequence = min((s for s in self.mailbox.live.values() if s.is_known), key=lambda s: (s.rank, s.id))
        error = CapacityError(
            f"no KV pages could be had for {len(sequence.tokens)} tokens though nothing else runs: "
            f"{self.pool.num_available} of {self.pool.num_pages} pages are free"
        )
        self._outcomes.end(sequence, "error", error)

    # ---- what came from outside

    def absorb(self) -> None:
        """Take in new requests and cancellations; put the books right first if a step was interrupted."""
        if self._doubt:
            self._recover()
        mailbox = self.mailbox
        self._doubt = _Doubt.PAGES  # before the flag: an interrupt between the two must not make the mail forgotten
        mailbox.has_mail = False
        if self.sharing is not None and self.sharing.fetcher.has_news:
            self._free_steps = 0
        while mailbox.inbox:
            self._welcome(mailbox.inbox[0])
            mailbox.inbox.popleft()
            self._free_steps = 0
        while mailbox.cancelled:
            self._outcomes.end(mailbox.cancelled[0], "cancelled")
            mailbox.cancelled.popleft()
        if self._outcomes.ended:
            self._bury()
        self._doubt = _Doubt.NONE

    def _welcome(self, sequence: RunningSequence) -> None:
        if sequence.is_known:
            return
        sequence.is_known = True
        self.scheduler.add(sequence)
        if self.sharing is not None:
            self.sharing.fetcher.welcome(sequence)
        self._deadlines.add(sequence, len(self.mailbox.live))

    def _merger(self) -> BackendMerger | None:
        config = self.config
        if config.distill is None:
            return None

        def num_computed(seq_id: int) -> int:
            sequence = self.mailbox.live.get(seq_id)
            return 0 if sequence is None else sequence.num_computed

        return BackendMerger(self.backend, self.kv, config.distill, config.rope, num_computed)

    def _recover(self) -> None:
        """After an interrupt inside a step. A token that was not taken is computed again, to the same bits.

        Where the books may be half written they are opened anew, and every sequence computes its KV again.
        """
        self._runner.close()
        self._free_steps = 0
        self._outcomes.ended = [s for s in self._outcomes.ended if s.progress.finish_reason is not None]
        live = tuple(self.mailbox.live.values())  # others may submit meanwhile
        for sequence in live:
            if sequence.has_enough and sequence.num_output >= sequence.num_observed:
                self._outcomes.end(sequence, "stop")
            elif sequence.num_output >= sequence.max_output:
                self._outcomes.end(sequence, "length")
        if self._doubt is not _Doubt.PAGES:
            return
        self.open_books()
        self._outcomes.ended.clear()
        self._deadlines.clear()
        for sequence in live:
            if sequence.progress.finish_reason is None:
                sequence.forget_kv()
                sequence.is_known = False
                self._welcome(sequence)
            else:
                self.mailbox.live.pop(sequence.id, None)

    def end_all(self, reason: str, error: GllmError | None = None) -> None:
        """End every request."""
        self.absorb()
        for sequence in tuple(self.mailbox.live.values()):
            self._outcomes.end(sequence, reason, error)
        self._bury()
        self._doubt = _Doubt.NONE

    # ---- looking in

    def read_logits(
        self, sequences: Sequence[Sequence[int]], ids: Sequence[int], first: int, visit: LogitsVisitor
    ) -> None:
        """Show the logits of sequences (of one length, named `ids`) from position `first` on.

        The tokens before are computed together. Running sequences yield their pages if need be.
        """
        with self._borrowed(sequences, ids) as pages:
            self._compute_before(sequences, pages, first)
            for i, tokens in enumerate(sequences):
                for start in range(first, len(tokens), LOGITS_CHUNK):
                    piece = SequenceInput(tokens[start : start + LOGITS_CHUNK], start, pages[i])
                    visit(i, start, self.backend.logits_forward(self.weights, self.kv, piece))

    def compute_whole(
        self, sequences: Sequence[Sequence[int]], ids: Sequence[int], compute: WholeForward
    ) -> np.ndarray:
        """What a forward pass over whole sequences (named `ids`) gives, rows in their order.

        Running sequences yield their pages if need be.
        """
        with self._borrowed(sequences, ids) as pages:
            batch = BatchInput([SequenceInput(tokens, 0, own) for tokens, own in zip(sequences, pages, strict=True)])
            return compute(self.backend, self.weights, self.kv, batch)

    @contextmanager
    def _borrowed(self, sequences: Sequence[Sequence[int]], ids: Sequence[int]) -> Iterator[list[Sequence[int]]]:
        """Pages for sequences that nobody schedules, for as long as the context lasts; no request goes on meanwhile."""
        self.absorb()
        self._doubt = _Doubt.PAGES
        self._runner.close()
        self._free_steps = 0
        taken: list[int] = []
        is_sound = False  # an interrupt before that leaves the books in doubt, to be opened anew
        try:
            pages = []
            try:
                for seq_id, tokens in zip(ids, sequences, strict=True):
                    pages.append(self.scheduler.borrow(seq_id, len(tokens)))
                    taken.append(seq_id)
                    self.manager.pin(seq_id)  # or it could be moved to the host for the next one
            except GllmError:
                is_sound = True
                raise
            is_sound = True
            self._doubt = _Doubt.LOOP
            yield pages
        finally:
            if is_sound:
                self._doubt = _Doubt.PAGES
                for seq_id in taken:
                    self.manager.close(seq_id)
                self._doubt = _Doubt.NONE

    def _compute_before(self, sequences: Sequence[Sequence[int]], pages: Sequence[Sequence[int]], first: int) -> None:
        """Write the KV of the first `first` tokens of each sequence."""
        chunk = max(self.config.scheduler.idle_chunk_size // len(sequences), 1)
        for start in range(0, first, chunk):
            batch = BatchInput(
                [
                    SequenceInput(tokens[start : min(start + chunk, first)], start, own, wants_logits=False)
                    for tokens, own in zip(sequences, pages, strict=True)
                ]
            )
            self.backend.batch_forward_gpu_pure(self.weights, self.kv, batch)

    def sequences_at_once(self, length: int, first: int) -> int:
        """How many sequences `read_logits` takes with profit: what fills a step, as far as there are pages."""
        fill = self.config.scheduler.idle_chunk_size // max(first, 1)
        return max(min(fill, self.pool.num_pages // self.pool.pages_for(length)), 1)

    def metrics(self) -> Metrics:
        """Counts and timings so far."""
        scheduler, counters, stats = self.scheduler, self._counters, self.manager.stats()
        return self._recorder.metrics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self.mailbox.inbox),
            preempted=len(scheduler.preempted),
            pages_total=stats.num_pages,
            pages_used=stats.num_used,
            pages_swapped=stats.num_swapped,
            preemptions=counters.preemptions,
            recomputes=counters.recomputes,
            swapped_out_pages=stats.counters.pages_swapped_out,
            swapped_in_pages=stats.counters.pages_swapped_in,
            copy_failures=counters.copy_failures,
            distilled_pages=stats.counters.pages_distilled,
            store=None if self.sharing is None else self.sharing.metrics(),
        )

    def audit(self) -> None:
        """Raise AssertionError unless the books agree with each other. Between steps only."""
        self.manager.audit()
        self.scheduler.audit()
        assert not self._outcomes.ended, "an ended request still holds something"
        known = {s.id for s in self.mailbox.live.values() if s.is_known}
        scheduled = (*self.scheduler.running, *self.scheduler.preempted, *self.scheduler.waiting)
        held = {s.id for s in scheduled}
        assert known == held, f"live requests {sorted(known)}, scheduled ones {sorted(held)}"
        with_kv, is_open = {s.id for s in scheduled if s.has_kv}, self.manager.sequences
        assert with_kv == is_open, f"sequences with KV {sorted(with_kv)}, those whose KV is kept {sorted(is_open)}"
