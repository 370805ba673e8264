"""Continuous batching: who computes how much in the next step, and whose pages make room for whom.

There is no prefill and no decode here, only "compute n more tokens of this sequence". Progress is certain: the
sequence that ranks first can always get its pages, because all others can lose theirs, by swapping or, where that
fails, by forgetting their KV and computing it again. So it runs to its end, and then another ranks first.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import BackendError, CapacityError
from .fair import FairQueue
from .plan import Piece, SchedulerConfig, StepPlan
from .request import Phase, RunningSequence

MIN_CHUNK = 2  # one token alone would take the kernels of decoding, whose bits may differ from those of a chunk


class KvPages(Protocol):
    """What the scheduler asks of the KV manager (gllm_driver.kv.manager has the meaning)."""

    def open(self, seq_id: int, tokens: Sequence[int]) -> int: ...
    def reserve(self, seq_id: int, num_tokens: int, running: Collection[int]) -> bool: ...
    def bring_in(self, seq_id: int, running: Collection[int]) -> bool: ...
    def is_resident(self, seq_id: int) -> bool: ...
    def pages(self, seq_id: int) -> Sequence[int]: ...
    def num_tokens_reserved(self, seq_id: int) -> int: ...
    def touch(self, seq_ids: Sequence[int]) -> None: ...
    def idle(self, seq_ids: Sequence[int]) -> None: ...
    def swap_out(self, seq_id: int) -> bool: ...
    def commit(self, seq_id: int, tokens: Sequence[int], num_computed: int) -> None: ...
    def close(self, seq_id: int) -> None: ...


@dataclass
class Counters:
    """What has happened so far."""

    preemptions: int = 0
    recomputes: int = 0  # preempted sequences whose KV was dropped
    copy_failures: int = 0


class Scheduler:
    """The owner of the order among sequences. Not thread-safe: the engine calls it from one step at a time.

    waiting: not begun. running: have their pages on the device, in the order of their rank. preempted: had them.
    """

    def __init__(self, kv: KvPages, config: SchedulerConfig, num_free_pages: Callable[[], int]) -> None:
        self.kv = kv
        self.config = config
        self.waiting = FairQueue()
        self.running: list[RunningSequence] = []
        self.preempted: list[RunningSequence] = []
        self.counters = Counters()
        self.is_ready: Callable[[RunningSequence], bool] = lambda sequence: True  # False: something is fetched for it
        self._num_free_pages = num_free_pages
        self._num_begun = 0

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.preempted or len(self.waiting))

    def add(self, sequence: RunningSequence) -> None:
        """A new request; it waits for its turn."""
        self.waiting.push(sequence)

    def remove(self, sequence: RunningSequence) -> None:
        """A sequence ends, whatever it was doing; its pages go back."""
        self._leave(sequence)
        sequence.phase = Phase.ENDED
        if sequence.has_kv:
            self._close(sequence)

    def share(self, sequence: RunningSequence) -> None:
        """Account for what has been computed, and offer the pages that have become full to other sequences."""
        whole = sequence.num_computed
        if whole > sequence.num_charged:
            self.waiting.charge(sequence, whole - sequence.num_charged)
            sequence.num_charged = whole
        if not self.config.chunk_invariant:  # KV of outputs has the bits of single steps, not those of a prompt
            whole = min(whole, sequence.prompt_length) if sequence.prompt_length > 1 else 0
        whole -= whole % self.config.page_size
        if whole > sequence.num_shared:
            sequence.num_shared = whole
            self.kv.commit(sequence.id, sequence.tokens, whole)

    # ---- the plan of a step

    def plan(self) -> StepPlan:
        """The next step: urgent newcomers, every decode, prompt chunks of those begun, then whoever else fits.

        It is empty only when there is nothing to do, or when the sequence of the highest rank cannot get its pages
        though it has no rival left: they do not exist.
        """
        plan = StepPlan()
        for sequence in self.running:
            self.share(sequence)
        self._admit_urgent()
        for sequence in tuple(self.running):
            self._add_decode(plan, sequence)
        num_decodes = len(plan.pieces)
        used = 0  # prompt tokens of this step
        for sequence in self.running:
            used += self._add_chunk(plan, sequence, self._prompt_budget(num_decodes) - used)
        while len(self.running) < self.config.max_batch and self._prompt_budget(num_decodes) - used >= MIN_CHUNK:
            newcomer = self._admit_next(force=not self.running)
            if newcomer is None:
                break
            num_decodes += self._add_decode(plan, newcomer)
            used += self._add_chunk(plan, newcomer, self._prompt_budget(num_decodes) - used)
        if plan.pieces:
            self.kv.touch([piece.sequence.id for piece in plan.pieces])
        return plan

    def _prompt_budget(self, num_decodes: int) -> int:
        left = self.config.max_tokens - num_decodes
        if not num_decodes:
            return min(left, self.config.idle_chunk_size)
        return left if self.config.chunk_size is None else min(left, self.config.chunk_size)

    def _add_decode(self, plan: StepPlan, sequence: RunningSequence) -> bool:
        """Plan one token of a sequence that decodes, if it is still among those that run and gets its page.

        One that has a chunk to compute gets its pages here too: they are there already, unless an interrupt came
        between its newest token and the count of what was computed, and that chunk is one token longer now.
        """
        if sequence.phase is not Phase.RUNNING or not self._make_room(sequence, len(sequence.tokens)):
            return False
        if sequence.chunk_left(self.config.chunk_invariant):
            return False
        plan.pieces.append(Piece(sequence, sequence.num_computed, 1))
        return True

    def _add_chunk(self, plan: StepPlan, sequence: RunningSequence, budget: int) -> int:
        """Plan the next chunk of a sequence's tokens; how many: 0 where it decodes or the budget is spent."""
        left = sequence.chunk_left(self.config.chunk_invariant)
        length = max(min(left, budget), 0)
        if left - length == 1:  # never leave one token behind, nor take one alone
            length -= 1
        if length < min(left, MIN_CHUNK) or not length:
            return 0
        plan.pieces.append(Piece(sequence, sequence.num_computed, length))
        return length

    # ---- who may run

    def _admit_urgent(self) -> None:
        """Let those in whose priority is above that of someone who runs, at that one's expense."""
        while self.running:
            candidate, last = self._next_candidate(), self.running[-1]
            if candidate is None or candidate.priority <= last.priority or not self._may_start(candidate):
                return
            if len(self.running) >= self.config.max_batch:
                self._put_aside(last)
            if not self._start(candidate, force=True):
                return

    def _admit_next(self, *, force: bool) -> RunningSequence | None:
        """The next sequence to join, if there is room for it beside those that run."""
        candidate = self._next_candidate()
        if candidate is None or not self._may_start(candidate) or (not force and self._waits_for_prefix(candidate)):
            return None
        return candidate if self._start(candidate, force=force) else None

    def _may_start(self, candidate: RunningSequence) -> bool:
        return candidate.phase is not Phase.WAITING or self.is_ready(candidate)

    def _next_candidate(self) -> RunningSequence | None:
        """Of one priority, those that have begun come before those that have not."""
        new = self.waiting.peek()
        if self.preempted and (new is None or self.preempted[0].priority >= new.priority):
            return self.preempted[0]
        return new

    def _waits_for_prefix(self, candidate: RunningSequence) -> bool:
        """Somebody is computing a prefix of this prompt right now: what is shared need not be computed twice."""
        if candidate.has_kv or candidate.phase is not Phase.WAITING:
            return False
        page = self.config.page_size
        for other in self.running:
            end = other.prompt_length - other.prompt_length % page
            if other.num_shared >= end or candidate.prompt_length <= other.num_shared + page:
                continue
            stop = other.num_shared + page
            if other.tokens[:stop] == candidate.tokens[:stop]:
                return True
        return False

    def _start(self, sequence: RunningSequence, *, force: bool) -> bool:
        """Give a sequence its place and the pages for all its tokens. `force`: lower ranks must yield."""
        if not sequence.order:
            self._num_begun += 1
            sequence.order = self._num_begun
        if not force and self._num_free_pages() < len(self.running) + 1:
            return False
        ready = self._bring_back(sequence, may_evict=force) and (force or self._has_slack(sequence))
        if not ready or not self._make_room(sequence, len(sequence.tokens), may_evict=force):
            if sequence.has_kv and sequence.phase is Phase.WAITING:
                self._close(sequence)
            return False
        if sequence.phase is Phase.WAITING:
            sequence.progress.cached_tokens = sequence.num_computed
        self._leave(sequence)
        sequence.phase = Phase.RUNNING
        insort(self.running, sequence, key=lambda s: s.rank)
        return True

    def _has_slack(self, sequence: RunningSequence) -> bool:
        """Room for a sequence and one more page for everybody, or somebody would have to be put aside soon."""
        held = max(self.kv.num_tokens_reserved(sequence.id), sequence.num_computed)
        pages = -(-max(len(sequence.tokens) - held, 0) // self.config.page_size)
        return not self.running or pages + len(self.running) + 1 <= self._num_free_pages()

    def _bring_back(self, sequence: RunningSequence, *, may_evict: bool) -> bool:
        """What KV the sequence has is on the device; a sequence without any is made known and gets what is shared."""
        if sequence.has_kv and not self.kv.is_resident(sequence.id):
            pages = -(-len(sequence.tokens) // self.config.page_size)
            if not may_evict and pages + len(self.running) + 1 > self._num_free_pages():
                return False
            try:
                while not self.kv.bring_in(sequence.id, self._running_ids()):
                    if may_evict and self._evict_below(sequence):
                        continue
                    if not may_evict or self.running:
                        return False
                    self._close(sequence)  # nobody is left who could make room: compute it again
                    self.counters.recomputes += 1
                    break
            except BackendError:
                self.counters.copy_failures += 1
                self._close(sequence)  # its copy cannot be had: compute it again
        if not sequence.has_kv:
            sequence.num_computed = self.kv.open(sequence.id, sequence.tokens[: sequence.prompt_length])
            sequence.num_shared = sequence.num_computed
            sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
            sequence.has_kv = True
        return True

    # ---- who must yield

    def _make_room(self, sequence: RunningSequence, num_tokens: int, *, may_evict: bool = True) -> bool:
        """Pages for `num_tokens` tokens of a sequence; False, and it is put aside, when higher ranks hold them."""
        while self.kv.num_tokens_reserved(sequence.id) < num_tokens and not self._reserve(sequence.id, num_tokens):
            if not may_evict or not self._evict_below(sequence):
                if sequence.phase is Phase.RUNNING:
                    self._put_aside(sequence)
                return False
        return True

    def _reserve(self, seq_id: int, num_tokens: int) -> bool:
        try:
            return self.kv.reserve(seq_id, num_tokens, {*self._running_ids(), seq_id})
        except BackendError:
            self.counters.copy_failures += 1
            return False

    def _evict_below(self, sequence: RunningSequence) -> bool:
        """Take pages from the lowest-ranking sequence below this one: first of those put aside, then of the running."""
        if self._evict_idle(but=sequence):
            return True
        if self.running and self.running[-1] is not sequence and self.running[-1].rank > sequence.rank:
            self._put_aside(self.running[-1])
            return True
        return False

    def _evict_idle(self, but: RunningSequence | None = None) -> bool:
        """Take its pages from the lowest-ranking sequence that was put aside and still has them on the device."""
        for other in reversed(self.preempted):
            if other is not but and other.has_kv and self.kv.is_resident(other.id):
                self._evict(other)
                return True
        return False

    def _put_aside(self, sequence: RunningSequence) -> None:
        """It no longer runs. Its pages stay until somebody needs them."""
        self.counters.preemptions += 1
        self._leave(sequence)
        sequence.phase = Phase.PREEMPTED
        insort(self.preempted, sequence, key=lambda s: s.rank)
        self.kv.idle([sequence.id])

    def _evict(self, sequence: RunningSequence) -> None:
        """Its pages leave the device: to the host, or for good where computing them again is cheaper."""
        if not self._recompute_is_cheaper(sequence):
            try:
                if self.kv.swap_out(sequence.id):
                    return
            except BackendError:
                self.counters.copy_failures += 1
        self.counters.recomputes += 1
        self._close(sequence)

    def _recompute_is_cheaper(self, sequence: RunningSequence) -> bool:
        outputs = max(sequence.num_computed - sequence.prompt_length, 0)
        if outputs and not self.config.chunk_invariant:
            return False  # they would be computed one by one
        pages = -(-self.kv.num_tokens_reserved(sequence.id) // self.config.page_size)
        return sequence.num_computed < pages * self.config.page_move_tokens

    def _close(self, sequence: RunningSequence) -> None:
        self.kv.close(sequence.id)
        sequence.has_kv = False
        sequence.num_computed = sequence.num_shared = 0

    def _leave(self, sequence: RunningSequence) -> None:
        """Take it out of the list it is in."""
        if sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
        elif sequence.phase is Phase.PREEMPTED:
            self.preempted.remove(sequence)
        elif sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)

    def _running_ids(self) -> set[int]:
        return {sequence.id for sequence in self.running}

    # ---- pages for something else

    def borrow(self, seq_id: int, num_tokens: int) -> Sequence[int]:
        """Pages for a sequence that is not scheduled; others yield theirs if need be. Give them back with kv.close.

        Raises CapacityError, with nothing taken, when the device has not as many.
        """
        self.kv.open(seq_id, ())
        try:
            while not self._reserve(seq_id, num_tokens):
                if not self._evict_idle():
                    if not self.running:
                        raise CapacityError(f"no KV pages could be had for {num_tokens} tokens")
                    self._put_aside(self.running[-1])
        except CapacityError:
            self.kv.close(seq_id)
            raise
        return self.kv.pages(seq_id)

    def audit(self) -> None:
        """Raise AssertionError unless the lists, their order and the phases agree."""
        for phase, members in ((Phase.RUNNING, self.running), (Phase.PREEMPTED, self.preempted)):
            assert all(s.phase is phase for s in members), f"a sequence in the list of {phase} thinks otherwise"
            ranks = [s.rank for s in members]
            assert ranks == sorted(ranks), f"{phase}: {ranks} are not in order"
        assert all(s.phase is Phase.WAITING and not s.has_kv for s in self.waiting), "a waiting sequence holds KV"
        assert all(s.has_kv and self.kv.is_resident(s.id) for s in self.running), "a running sequence has no pages"
        assert len(self.running) <= self.config.max_batch, f"{len(self.running)} run, at most {self.config.max_batch}"
        for s in (*self.running, *self.preempted):
            assert 0 <= s.num_computed < len(s.tokens), f"{s.num_computed} of {len(s.tokens)} tokens are computed"
