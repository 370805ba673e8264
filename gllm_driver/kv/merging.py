"""Sequences that make room by merging old pages: which pages, and the books around it. Contents are the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..config import DistillConfig
from .book import PageBook
from .distill import exact_bounds
from .groups import Block, Group, pages_of
from .pages import PagePool


class PageMerger(Protocol):
    """Makes one page of several (gllm_driver.kv.distill has the arithmetic). Calls are ordered with the steps."""

    config: DistillConfig

    def num_computed(self, seq_id: int) -> int:
        """Of how many of a sequence's tokens the KV is there; 0 for a sequence that must stay as it is."""

    def read(self, pages: Sequence[int]) -> Any:
        """What every `config.ratio` pages in turn become. Whatever happens to the pages afterwards does not matter."""

    def write(self, merged: Any, pages: Sequence[int]) -> None:
        """Put what `read` returned into pages."""


def mergeable(blocks: Sequence[Block], pool: PagePool, config: DistillConfig, num_computed: int) -> list[int]:
    """Where windows of `config.ratio` blocks begin that can become one each, none overlapping another.

    They have computed tokens alone, none of the first or last that stay exact; each block is one page of the sequence
    (not merged before) and no other sequence on the device has it.
    """
    start, stop = exact_bounds(num_computed, pool.page_size, config.sinks, config.window)
    found: list[int] = []
    entry = length = 0  # place in the page table; how many blocks in a row would do
    for i, block in enumerate(blocks):
        if entry >= stop:
            break
        assert block.page is not None
        fits = entry >= start and block.repeat == 1 and pool.holders(block.page) == 1
        length = length + 1 if fits else 0
        if length == config.ratio:
            found.append(i + 1 - length)
            length = 0
        entry += block.repeat
    return found


def merge_group(book: PageBook, group: Group, merger: PageMerger) -> bool:
    """Merge what can be merged of a sequence on the device. False: nothing can; nothing changed.

    Raises what the merger raises: from its `read`, nothing has changed; from its `write`, the group's blocks no longer
    hold what they should.
    """
    ratio = merger.config.ratio
    starts = mergeable(group.blocks, book.pool, merger.config, merger.num_computed(group.seq_id))
    if not starts:
        return False
    old = [block for start in starts for block in group.blocks[start : start + ratio]]
    merged = merger.read(pages_of(old))
    book.release(old)
    book.make_free(len(starts))  # there are as many: the released ones were nobody else's
    new = book.new_blocks(len(starts))
    for start, block in zip(reversed(starts), reversed(new), strict=True):
        block.repeat = ratio
        group.blocks[start : start + ratio] = [block]
    group.is_distilled = True
    # What is computed from now on follows from KV that is not exact: no other sequence may find it.
    group.is_findable, group.num_indexed, group.tail = False, 0, None
    group.pages = group.table()
    merger.write(merged, pages_of(new))
    return True
