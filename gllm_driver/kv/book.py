"""Blocks and where their contents are: on the device, on the host, or both. Who leaves is decided elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from .groups import Block, Counters, as_block, pages_of
from .pages import PagePool
from .prefix import PrefixIndex, PrefixNode


class PageCopier(Protocol):
    """Moves page contents. Calls are ordered with the steps before and after; a failing one changes nothing."""

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy device pages to host slots."""

    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host slots to device pages."""


class PageBook:
    """Device pages, host slots and the blocks in them, kept equal to what the copier did."""

    def __init__(
        self,
        pool: PagePool,
        num_host_slots: int,
        copier: PageCopier,
        index: PrefixIndex | None,
        clock: Callable[[], float],
        counters: Counters,
    ) -> None:
        self.pool = pool
        self.host = PagePool(num_host_slots, pool.page_size)
        self.index = index
        self.blocks: dict[int, Block] = {}  # by device page
        self._copier = copier
        self._clock = clock
        self._counters = counters

    def new_blocks(self, count: int) -> list[Block]:
        """Blocks on free pages, of which there must be enough, held once."""
        blocks = [Block(page) for page in self.pool.take(count)]
        self.blocks.update((page, block) for block in blocks if (page := block.page) is not None)
        return blocks

    def retain(self, blocks: Iterable[Block]) -> None:
        """One more holder for blocks on the device."""
        self.pool.retain(pages_of(blocks))

    def release(self, blocks: Sequence[Block]) -> None:
        """One holder less on the device, last first, so that of a cached chain the end goes before what it follows."""
        for block in reversed(blocks):
            page = block.page
            assert page is not None
            self.pool.release((page,))
            if not self.pool.holders(page) and not self.pool.is_cached(page):
                del self.blocks[page]
                block.page = None

    @contextmanager
    def held(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Blocks on the device stay there meanwhile."""
        self.retain(blocks)
        try:
            yield
        finally:
            self.release(blocks)

    def make_free(self, count: int) -> None:
        """Have `count` free pages by evicting cached ones, of which there must be enough."""
        while self.pool.num_free < count:
            self._evict_cached()

    def copy_out(self, blocks: Sequence[Block]) -> float:
        """Give blocks without a host slot one, in one copy; there must be slots enough. How many seconds it took."""
        slots = self.host.take(len(blocks))
        if not blocks:
            return 0.0
        with self._given_back_unless_done(self.host, slots):
            start = self._clock()
            self._copier.swap_out(pages_of(blocks), slots)
            seconds = self._clock() - start
        for block, slot in zip(blocks, slots, strict=True):
            block.slot = slot
        return seconds

    def copy_in(self, blocks: Sequence[Block]) -> float:
        """Give blocks on the host a free page, in one copy, held once. How many seconds it took."""
        pages = self.pool.take(len(blocks))
        if not blocks:
            return 0.0
        with self._given_back_unless_done(self.pool, pages):
            start = self._clock()
            self._copier.swap_in([block.slot for block in blocks if block.slot is not None], pages)
            seconds = self._clock() - start
        for block, page in zip(blocks, pages, strict=True):
            block.page = page
            self.blocks[page] = block
        return seconds

    def enter_host(self, blocks: Iterable[Block]) -> None:
        """One more sequence on the host has these blocks."""
        for block in blocks:
            block.num_swapped += 1

    def leave_host(self, blocks: Iterable[Block]) -> None:
        """One sequence less: slots nobody needs are free again."""
        for block in blocks:
            block.num_swapped -= 1
            if block.num_swapped == 0 and block.slot is not None:
                self.host.release((block.slot,))
                block.slot = None

    def make_findable(self, block: Block, node: PrefixNode) -> None:
        """The block's contents are those of the node: keep its page when nobody holds it any more."""
        assert block.page is not None
        block.node = node
        self.pool.keep(block.page)

    def _evict_cached(self) -> None:
        """Make the cached page released longest ago free, and take what follows it out of the index."""
        node = self.blocks[self.pool.oldest_cached()].node
        assert node is not None
        assert self.index is not None
        for gone in self.index.remove(node):
            block = as_block(gone.block)
            page = block.page
            assert page is not None
            block.node = None
            was_cached = self.pool.is_cached(page)
            self.pool.forget(page)
            if was_cached:
                del self.blocks[page]
                block.page = None
                self._counters.cached_pages_evicted += 1

    @contextmanager
    def _given_back_unless_done(self, pool: PagePool, pages: Sequence[int]) -> Iterator[None]:
        """Give newly taken pages back if the copy they were taken for fails."""
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not is_done:
                self._counters.copy_failures += 1
                pool.release(pages)
