"""Room on the device: who leaves it for whom, by merging, by moving to the host, and before it is short."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from ..config import SwapConfig
from ..errors import GllmError
from .book import PageBook
from .groups import THRASH_S, Counters, Group
from .merging import PageMerger, merge_group
from .swap import Candidate, VictimPolicy, fewest_groups


class Room:
    """Takes pages from groups that do not run, those first that the policy says. Groups are by sequence."""

    def __init__(
        self,
        book: PageBook,
        groups: Mapping[int, Group],
        policy: VictimPolicy,
        config: SwapConfig,
        clock: Callable[[], float],
        counters: Counters,
        merger: PageMerger | None,
    ) -> None:
        self._book = book
        self._groups = groups
        self._policy = policy
        self._config = config
        self._clock = clock
        self._counters = counters
        self._merger = merger

    def make(self, count: int, seq_id: int, running: Collection[int]) -> bool:
        """Have `count` free pages. False, or an error of the copier: nothing changed but that pages were merged."""
        pool = self._book.pool
        if count > pool.num_available and self._merger is not None:
            self._distill_others(count, seq_id, running)
        short = count - pool.num_available
        if short > 0:
            victims, freed = self._victims(short, seq_id, running)
            if freed < short:
                return False
            self.move_out(victims)
        else:
            self._relieve(count, seq_id, running)
        self._book.make_free(count)
        return True

    def _relieve(self, count: int, seq_id: int, running: Collection[int]) -> None:
        """Swap idle sequences out when `count` more pages in use would pass the threshold."""
        above = self._book.pool.num_used + count - int(self._config.swap_threshold * self._book.pool.num_pages)
        if above > 0:
            victims, _ = self._victims(above, seq_id, running, must_be_idle=True)
            with suppress(GllmError):  # counted; there is room without it, and it shows again when there is none
                self.move_out(victims)

    def _victims(
        self, wanted: int, seq_id: int, running: Collection[int], *, must_be_idle: bool = False
    ) -> tuple[list[Group], int]:
        """The groups to swap out for `wanted` pages, a whole number of granules, and how many they free."""
        if not self._config.enable_swap:
            return [], 0
        granule = self._config.granularity_pages
        chosen, freed = fewest_groups(
            self._ranked(seq_id, running, must_be_idle=must_be_idle),
            -(-wanted // granule) * granule,
            holders=self._book.pool.holders,
            needs_slot=lambda page: self._book.blocks[page].slot is None,
            free_slots=self._book.host.num_free,
        )
        return [self._groups[candidate.group] for candidate in chosen], freed

    def _ranked(self, seq_id: int, running: Collection[int], *, must_be_idle: bool = False) -> list[Candidate]:
        """The groups that may leave the device for the sequence, those to go first first."""
        now = self._clock()
        excluded = {seq_id, *running}
        candidates = [
            Candidate(
                group.seq_id,
                group.own_pages(),
                group.state.access_count,
                group.state.last_access,
                group.state.swap_in_time,
            )
            for group in self._groups.values()
            if group.pages
            and not group.is_pinned
            and group.seq_id not in excluded
            and group.state.may_leave(now, must_be_idle=must_be_idle)
        ]
        return self._policy.ranked(candidates, now)

    def _distill_others(self, count: int, seq_id: int, running: Collection[int]) -> None:
        """Merge pages of sequences that may leave, in the order in which they would, until `count` pages can be had."""
        for candidate in self._ranked(seq_id, running):
            if count <= self._book.pool.num_available:
                return
            with suppress(GllmError):  # counted; that sequence is as it was, or to be computed again
                self.distill(self._groups[candidate.group])

    def distill(self, group: Group) -> bool:
        """Merge what can be merged of a sequence; whether that was anything. After an error of `write` it is lost."""
        if self._merger is None:
            return False
        counters, before = self._counters, len(group.blocks)
        is_done = False
        try:
            if not merge_group(self._book, group, self._merger):
                return False
            is_done = True
        finally:
            if not is_done and len(group.blocks) < before:
                counters.copy_failures += 1
                self.let_go(group)
                group.is_resident, group.is_lost = False, True
        counters.groups_distilled += 1
        counters.pages_distilled += before - len(group.blocks)
        self._policy.resized(group.seq_id, len(group.blocks))
        return True

    def move_out(self, groups: Sequence[Group]) -> None:
        """Swap groups out in one copy. The caller has seen to it that the host has slots enough."""
        now = self._clock()
        blocks = list(dict.fromkeys(block for group in groups for block in group.blocks if block.slot is None))
        seconds = self._book.copy_out(blocks)
        counters = self._counters
        for group in groups:
            self._book.enter_host(group.blocks)
            self._book.release(group.blocks)
            group.pages = []
            group.is_resident = False
            swap_in_time = group.state.swap_in_time
            counters.num_thrashed += swap_in_time is not None and now < swap_in_time + THRASH_S
            group.state.swapped_out()
        counters.groups_swapped_out += len(groups)
        counters.pages_swapped_out += len(blocks)
        counters.num_swap_outs += bool(blocks)
        counters.swap_out_s += seconds

    def let_go(self, group: Group) -> None:
        """The sequence's blocks are no longer its own, wherever they are."""
        if group.is_resident:
            self._book.release(group.blocks)
        else:
            self._book.leave_host(group.blocks)
        group.blocks = []
        group.pages = []
        group.is_resident = group.is_findable = True
        group.is_distilled = group.is_lost = False
        group.num_tokens = group.num_indexed = 0
        group.tail = None
