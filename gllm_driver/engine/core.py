"""Steps, one at a time: plan → forward → sample → commit → emit. Errors end requests, not the engine."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from ..backends.base import Backend, KvCacheHandle, WeightsHandle
from ..config import DistillConfig, SwapConfig
from ..errors import BackendError, CapacityError, GllmError
from ..kv.distill import Rope
from ..kv.manager import KvManager
from ..kv.pages import PagePool
from ..metrics import Metrics, Recorder
from ..sched.plan import Piece, SchedulerConfig
from ..sched.request import RunningSequence
from ..sched.scheduler import Counters, Scheduler
from ..types import BatchInput, SequenceInput
from .distill import BackendMerger
from .mailbox import Deadlines, Mailbox
from .runner import Result, Runner
from .sharing import KvSharing, KvSharingConfig
from .swap import Swapper

LOGITS_CHUNK = 256  # tokens of one step whose logits are all read

LogitsVisitor = Callable[[int, int, np.ndarray], None]
"""Told of logits: (index of the sequence, position of the first row, f32 [n, vocab])."""

WholeForward = Callable[[Backend, WeightsHandle, KvCacheHandle, BatchInput], np.ndarray]
"""A forward pass over whole sequences, whose result has a row for each."""


@dataclass(frozen=True)
class EngineConfig:
    """How requests share the device. prefix_reuse: prompts that begin alike share the KV of that beginning."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    prefix_reuse: bool = True
    kv_sharing: KvSharingConfig | None = None  # a store beyond this engine's life; it needs prefix_reuse
    distill: DistillConfig | None = None  # what must make room gets smaller first, and no longer exact
    rope: Rope | None = None  # how the model rotates keys, for those who merge them


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
        self._counters = Counters()

        self.mailbox = Mailbox()
        self.sharing: KvSharing | None = None
        if config.kv_sharing is not None:
            self.sharing = KvSharing(backend, weights, kv, config.kv_sharing, self.mailbox.knock)
        self._deadlines = Deadlines()
        self._doubt = _Doubt.NONE
        self._ended: list[RunningSequence] = []
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
        if self._ended:
            self._bury()
        self._doubt = _Doubt.NONE
        return True

    def _plan_and_run(self) -> None:
        if self._deadlines:
            self._end_overdue(perf_counter())
            if self._ended:
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
            self._commit(piece, result, now, now - start)
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
                self._take(sequence, result, now, now - start)
                sequence.num_computed += 1
            elif isinstance(result, GllmError):
                self._end(sequence, "error", result)

    def _commit(self, piece: Piece, result: Result, now: float, seconds: float) -> None:
        """Make a piece's result part of its sequence."""
        sequence = piece.sequence
        if isinstance(result, GllmError):
            self._end(sequence, "error", result)
            return
        if result is None:
            sequence.progress.prefill_s += seconds
        else:
            self._take(sequence, result, now, seconds)
        # After the token: an interrupt between the two makes the next step compute this piece again, which is harmless.
        sequence.num_computed = piece.start + piece.length

    def _take(self, sequence: RunningSequence, token: int, now: float, seconds: float) -> None:
        """A token has been sampled for a sequence: it goes on, or ends."""
        progress, last = sequence.progress, sequence.last_token_at
        if progress.finish_reason is not None:  # its deadline passed during this step
            return
        if last is None:
            progress.prefill_s += seconds
            self._recorder.time_to_first_token.add(now - sequence.submitted_at)
            self._recorder.prompt_tokens += sequence.prompt_length
            self._recorder.cached_tokens += progress.cached_tokens
        else:
            progress.decode_s += seconds
            progress.decode_steps += 1
            self._recorder.inter_token_latency.add(now - last)
        sequence.last_token_at = now
        if token < 0:
            self._end(sequence, "error", _no_number(len(sequence.tokens)))
            return
        request = sequence.request
        if token in request.eos_token_ids:
            self._end(sequence, "stop")
            return
        enough = request.on_token is not None and self._observe(sequence, token, request.on_token)
        sequence.tokens.append(token)
        if enough:
            self._end(sequence, "stop")
        elif len(sequence.tokens) - sequence.prompt_length >= sequence.max_output:
            self._end(sequence, "length")
        if sequence.listener is not None:
            sequence.listener()

    def _observe(self, sequence: RunningSequence, token: int, on_token: Callable[[int], bool]) -> bool:
        """Tell the request's observer, once even when an interrupt lets the token come twice; True: it has enough."""
        if sequence.num_observed > sequence.num_output:
            return False
        sequence.num_observed += 1
        try:
            return on_token(token)
        except GllmError as error:
            self._end(sequence, "error", error)
            return False

    # ---- ends

    def _end(self, sequence: RunningSequence, reason: str, error: GllmError | None = None) -> None:
        """The request is over. Its reader may know at once; its pages go back before the step ends."""
        if sequence.progress.finish_reason is not None:
            return
        sequence.error = error
        self._ended.append(sequence)
        sequence.progress.finish_reason = reason
        self._recorder.requests[reason] = self._recorder.requests.get(reason, 0) + 1
        self._recorder.output_tokens += sequence.num_output
        if sequence.listener is not None:
            sequence.listener()

    def _bury(self) -> None:
        """Give back what ended requests hold. The decode loop had them as members, or may now have room for others."""
        self._doubt = _Doubt.PAGES
        self._runner.close()
        self._free_steps = 0
        while self._ended:
            sequence = self._ended[-1]
            if sequence.has_kv and sequence.error is None:
                self.scheduler.share(sequence)
            if self.sharing is not None:
                self.sharing.end(sequence)
            self.scheduler.remove(sequence)
            self.mailbox.live.pop(sequence.id, None)
            self._ended.pop()
        if self.scheduler.is_idle:
            self._deadlines.clear()

    def _end_overdue(self, now: float) -> None:
        for sequence in self._deadlines.overdue(now):
            self._end(sequence, "deadline")

    def _refuse_first(self) -> None:
        """Nothing can be computed though something waits: end whoever ranks first rather than wait for ever."""
        sequence = min((s for s in self.mailbox.live.values() if s.is_known), key=lambda s: (s.rank, s.id))
        error = CapacityError(
            f"no KV pages could be had for {len(sequence.tokens)} tokens though nothing else runs: "
            f"{self.pool.num_available} of {self.pool.num_pages} pages are free"
        )
        self._end(sequence, "error", error)

    # ---- what came from outside

    def absorb(self) -> None:
        """Take in new requests and cancellations; put the books right first if a step was interrupted."""
        if self._doubt:
            self._recover()
        mailbox = self.mailbox
        mailbox.has_mail = False
        self._doubt = _Doubt.PAGES
        if self.sharing is not None and self.sharing.fetcher.has_news:
            self._free_steps = 0
        while mailbox.inbox:
            self._welcome(mailbox.inbox[0])
            mailbox.inbox.popleft()
            self._free_steps = 0
        while mailbox.cancelled:
            self._end(mailbox.cancelled[0], "cancelled")
            mailbox.cancelled.popleft()
        if self._ended:
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
        self._ended = [s for s in self._ended if s.progress.finish_reason is not None]
        live = tuple(self.mailbox.live.values())  # others may submit meanwhile
        for sequence in live:
            if sequence.num_output >= sequence.max_output:
                self._end(sequence, "length")
        if self._doubt is not _Doubt.PAGES:
            return
        self.open_books()
        self._ended.clear()
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
            self._end(sequence, reason, error)
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
        try:
            pages = []
            for seq_id, tokens in zip(ids, sequences, strict=True):
                pages.append(self.scheduler.borrow(seq_id, len(tokens)))
                taken.append(seq_id)
                self.manager.pin(seq_id)  # or it could be moved to the host for the next one
            self._doubt = _Doubt.LOOP
            yield pages
        finally:
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
        assert not self._ended, "an ended request still holds something"
        known = {s.id for s in self.mailbox.live.values() if s.is_known}
        held = {s.id for s in (*self.scheduler.running, *self.scheduler.preempted, *self.scheduler.waiting)}
        assert known == held, f"live requests {sorted(known)}, scheduled ones {sorted(held)}"


def _no_number(position: int) -> BackendError:
    return BackendError(
        f"the logits after {position} tokens hold no number: the weights overflow in this dtype; try --dtype f32"
    )
