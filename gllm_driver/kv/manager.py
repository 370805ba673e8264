"""The KV manager: which sequence has which pages, what leaves the device when room is needed, what is found again.

Integers only. Copies go through a `PageCopier`, time through a clock; the engine supplies both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import SwapConfig
from ..errors import BackendError, CapacityError
from ..types import PageMetadata
from .adopt import Fill, adopt
from .book import PageBook, PageCopier
from .groups import Counters, Group, KvStats, as_block, pages_of
from .merging import PageMerger
from .pages import PagePool
from .prefix import PrefixIndex, PrefixNode
from .report import audit, fragmentation, page_states
from .room import Room
from .states import GroupState
from .swap import Hgal, VictimPolicy


@dataclass(frozen=True)
class CachedKvHandle:
    """KV of the longest known prefix of some tokens, kept on the device until `KvManager.release` is called."""

    seq_id: int
    num_tokens: int
    pages: tuple[int, ...]


class KvManager:
    """Sequences, their pages, and the host's copies.

    A sequence is opened, gets room (`reserve`), is marked at each step that reads it (`touch`) and when it stops
    running (`idle`), has its computed tokens committed, and is closed. Between steps it is wholly on the device or
    wholly on the host. Every block of a sequence on the host has a slot, so it needs nothing of the device. A page that
    other sequences on the device share stays there for them; it is copied to the host once, however many sharers
    leave, and not copied back while it is still on the device.

    Errors of the copier pass through. The call that meets one changes nothing, except that `bring_in` may have moved
    other sequences to the host before its own copy failed.

    With a `merger`, sequences that must make room have their old pages merged first, and leave only when that is not
    enough. Merged KV is not exact: nothing computed after it is ever found by another sequence, and `drop` or `close`
    ends it.
    """

    def __init__(
        self,
        pool: PagePool,
        copier: PageCopier,
        config: SwapConfig,
        *,
        num_host_slots: int,
        root_key: bytes,
        clock: Callable[[], float],
        prefix_reuse: bool = True,
        policy: VictimPolicy | None = None,
        merger: PageMerger | None = None,
    ) -> None:
        self.pool = pool
        self.config = config
        self.policy: VictimPolicy = policy or Hgal(config)
        self._clock = clock
        self._groups: dict[int, Group] = {}
        self._index = PrefixIndex(pool.page_size, root_key) if prefix_reuse else None
        self._counters = Counters()
        self._book = PageBook(pool, num_host_slots, copier, self._index, clock, self._counters)
        self._room = Room(self._book, self._groups, self.policy, config, clock, self._counters, merger)
        self._next_handle = -1  # handles are sequences with ids below zero

    # Sequences

    def open(self, seq_id: int, tokens: Sequence[int]) -> int:
        """Register a sequence, or take up again one that was dropped.

        Returns how many leading tokens have their KV already: whole pages, at least 2 tokens left to compute. Those
        pages are the sequence's from now on. Raises ValueError when the sequence has pages.
        """
        group = self._groups.get(seq_id)
        if group is None:
            group = self._groups[seq_id] = Group(seq_id, GroupState(self.config))
            self.policy.added(seq_id, 0)
        elif group.blocks:
            raise ValueError(f"sequence {seq_id} is open and has KV: close or drop it first")
        nodes = self._match(tokens)
        blocks = [as_block(node.block) for node in nodes]
        self._book.retain(blocks)
        group.blocks = blocks
        group.pages = pages_of(blocks)
        group.num_indexed = len(nodes)
        group.tail = nodes[-1] if nodes else None
        group.num_tokens = len(nodes) * self.pool.page_size
        self.policy.resized(seq_id, len(nodes))
        self._counters.prefix_tokens_asked += len(tokens)
        self._counters.prefix_tokens_hit += group.num_tokens
        return group.num_tokens

    def close(self, seq_id: int) -> None:
        """Forget a sequence. Its full committed pages can be found until they are needed for something else."""
        self._room.let_go(self._groups[seq_id])
        self.policy.removed(seq_id)
        del self._groups[seq_id]

    def drop(self, seq_id: int) -> None:
        """Preempt by recompute: give the pages back, keep the registration. `open` it again before it goes on."""
        group = self._groups[seq_id]
        self._room.let_go(group)
        self.policy.resized(seq_id, 0)
        group.state.restarted()

    def pin(self, seq_id: int, *, pinned: bool = True) -> None:
        """A pinned sequence is not swapped out."""
        self._groups[seq_id].is_pinned = pinned

    def is_resident(self, seq_id: int) -> bool:
        """Whether all its KV is on the device (true of a sequence that has none yet)."""
        return self._groups[seq_id].is_resident

    def is_exact(self, seq_id: int) -> bool:
        """Whether nothing of its KV was merged, nor computed after KV that was: only then may it be kept for others."""
        return not self._groups[seq_id].is_distilled

    def pages(self, seq_id: int) -> Sequence[int]:
        """The page table, a list that grows in place; empty while the sequence is on the host."""
        return self._groups[seq_id].pages

    def num_tokens_reserved(self, seq_id: int) -> int:
        return self._groups[seq_id].num_tokens

    @property
    def sequences(self) -> set[int]:
        """Those that are open, handles left out."""
        return {seq_id for seq_id in self._groups if seq_id >= 0}

    # Room

    def reserve(self, seq_id: int, num_tokens: int, running: Collection[int]) -> bool:
        """Device pages for `num_tokens` tokens in total, the sequence being on the device.

        Takes free pages, then cached ones nobody holds, then those of victim groups, never of members of `running`.
        False: no room now, nothing changed. Raises CapacityError when the tokens alone exceed the pool.
        """
        group = self._groups[seq_id]
        if not group.is_resident:
            raise ValueError(f"sequence {seq_id} is on the host: bring it in before reserving")
        wanted = self.pool.pages_for(num_tokens)
        if wanted > self.pool.num_pages:
            raise CapacityError(
                f"{num_tokens} tokens need {wanted} KV pages of {self.pool.page_size}, the cache has "
                f"{self.pool.num_pages}: ask for fewer tokens or load the model with a larger context"
            )
        count = wanted - len(group.pages)
        if count > 0:
            if not self._room.make(count, seq_id, running):
                return False
            blocks = self._book.new_blocks(count)
            group.blocks += blocks
            group.pages += pages_of(blocks)
            self.policy.resized(seq_id, len(group.blocks))
        group.num_tokens = max(group.num_tokens, num_tokens)
        return True

    def bring_in(self, seq_id: int, running: Collection[int]) -> bool:
        """Put the whole sequence back on the device, where it is Warm. False: no room now, nothing changed.

        Raises BackendError when its KV was lost.
        """
        group = self._groups[seq_id]
        if group.is_resident:
            return True
        if group.is_lost:
            raise BackendError(f"the KV of sequence {seq_id} was lost when it was to be merged: compute it again")
        here = [block for block in group.blocks if block.page is not None]
        missing = [block for block in group.blocks if block.page is None]
        with self._book.held(here):  # or making room could take them
            if not self._room.make(len(missing), seq_id, running):
                return False
            seconds = self._book.copy_in(missing)
            self._book.retain(here)
        self._book.leave_host(group.blocks)
        group.is_resident = True
        group.was_missed = True
        group.pages = group.table()
        group.state.swapped_in(self._clock())
        counters = self._counters
        counters.groups_swapped_in += 1
        counters.pages_swapped_in += len(missing)
        counters.num_swap_ins += bool(missing)
        counters.swap_in_s += seconds
        return True

    def swap_out(self, seq_id: int) -> bool:
        """Preempt by swap: a protected sequence leaves the working set by this.

        With a merger, a sequence that becomes smaller by merging stays on the device, and leaves when asked again.
        False, nothing changed: the host has no room, swapping is off, or the sequence is warm, pinned or not there.
        """
        group = self._groups[seq_id]
        if not group.is_resident or not group.blocks or group.is_pinned or group.state.is_warm(self._clock()):
            return False
        if self._room.distill(group):
            return True
        slots = sum(block.slot is None for block in group.blocks)
        if not self.config.enable_swap or slots > self._book.host.num_free:
            return False
        group.state.preempted()
        self._room.move_out([group])
        return True

    # Steps

    def touch(self, seq_ids: Iterable[int]) -> None:
        """The step about to run reads all pages of these sequences, which must be on the device."""
        now = self._clock()
        for seq_id in seq_ids:
            group = self._groups[seq_id]
            if not group.is_resident:
                raise ValueError(f"sequence {seq_id} is on the host: bring it in before a step reads it")
            self._count_access(group, now)
            group.state.accessed(now)
            self.policy.accessed(seq_id)

    def idle(self, seq_ids: Iterable[int]) -> None:
        """These sequences no longer run."""
        for seq_id in seq_ids:
            self._groups[seq_id].state.idled()

    def commit(self, seq_id: int, tokens: Sequence[int], num_computed: int) -> None:
        """The KV of `tokens[:num_computed]` has been written: its full pages can be found by other sequences."""
        group = self._groups[seq_id]
        num_full = min(num_computed // self.pool.page_size, len(group.blocks))
        if self._index is None or not group.is_findable or group.num_indexed >= num_full or not group.is_resident:
            return
        if group.tail is not None and not group.tail.is_indexed:  # it was needed for something else meanwhile
            group.num_indexed, group.tail = 0, None
        size = self.pool.page_size
        for i in range(group.num_indexed, num_full):
            block = group.blocks[i]
            node = self._index.insert(group.tail, tokens[i * size : (i + 1) * size], block)
            if node is None:
                group.is_findable = False
                return
            if node.block is block:
                self._book.make_findable(block, node)
            group.tail = node
            group.num_indexed = i + 1

    # Prefixes

    def cached_tokens(self, tokens: Sequence[int]) -> int:
        """How many leading tokens `open` would find, without taking anything."""
        return len(self._match(tokens)) * self.pool.page_size

    def get_cached_kv_handle(self, tokens: Sequence[int]) -> CachedKvHandle | None:
        """Hold the KV of the longest known prefix on the device, or None; `release` it when done."""
        if not self.cached_tokens(tokens):
            return None
        seq_id = self._next_handle
        self._next_handle -= 1
        num_tokens = self.open(seq_id, tokens)
        self.pin(seq_id)
        return CachedKvHandle(seq_id, num_tokens, tuple(self.pages(seq_id)))

    def release(self, handle: CachedKvHandle) -> None:
        """Give up a handle; its pages are no longer held. Once only."""
        self.close(handle.seq_id)

    def adopt(self, tokens: Sequence[int], start: int, fill: Fill) -> bool:
        """Make KV that was computed elsewhere findable (kv/adopt.py)."""
        return self._index is not None and adopt(self._book, self._index, tokens, start, fill)

    # What is known

    def page_states(self) -> dict[int, PageMetadata]:
        """Every device page by id, and every host slot in use by `num_pages + slot`. To be called between steps."""
        return page_states(self.pool, self._groups.values(), self.policy, self._clock())

    def pressure(self) -> float:
        """Share of the pool's pages that sequences on the device hold."""
        return self.pool.num_used / self.pool.num_pages

    def stats(self) -> KvStats:
        pool, host = self.pool, self._book.host
        return KvStats(
            num_pages=pool.num_pages,
            num_free=pool.num_free,
            num_used=pool.num_used,
            num_shared=pool.num_shared,
            num_cached=pool.num_cached,
            num_host_slots=host.num_pages,
            num_swapped=host.num_used,
            fragmentation=fragmentation(pool, tuple(self._groups.values())),  # another thread may be stepping
            counters=replace(self._counters),
        )

    def audit(self) -> None:
        """Raise AssertionError unless pages, slots, blocks, groups and index agree."""
        audit(self.pool, self._book.host, self._groups, self._book.blocks, self._index or ())

    # Inside

    def _match(self, tokens: Sequence[int]) -> list[PrefixNode]:
        if self._index is None:
            return []
        return self._index.match(tokens, max(0, len(tokens) - 2) // self.pool.page_size)

    def _count_access(self, group: Group, now: float) -> None:
        last = group.state.last_access
        if last is not None and now - last <= self.config.working_set_window:
            self._counters.working_set_accesses += 1
            self._counters.working_set_hits += not group.was_missed
        group.was_missed = False
