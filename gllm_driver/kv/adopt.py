"""KV that was computed elsewhere becomes pages that any sequence finds by their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .book import PageBook
from .groups import as_block, pages_of
from .prefix import PrefixIndex, PrefixNode

Fill = Callable[[int, Sequence[int]], None]
"""fill(first, pages): write the KV of page `first` of the stretch, and of those after it, to `pages`."""


def adopt(book: PageBook, index: PrefixIndex, tokens: Sequence[int], start: int, fill: Fill) -> bool:
    """Make the whole pages of `tokens` findable: those from token `start` on are written by `fill`, where they are not
    there already. Nobody holds them then: they stay until pages are needed for something else.

    Takes free pages and cached ones, never those of a sequence. False: what precedes `start` cannot be found, there is
    no room, or digests collide; nothing is lost then. What `fill` raises passes through, with nothing changed.
    """
    size = index.page_size
    nodes = index.match(tokens, len(tokens) // size)
    count = len(tokens) // size - len(nodes)
    if len(nodes) * size < start:
        return False
    with book.held([as_block(node.block) for node in nodes]):  # or making room could take them
        if book.pool.num_available < count:
            return False
        book.make_free(count)
        blocks = book.new_blocks(count)
        try:
            if blocks:
                fill(len(nodes) - start // size, pages_of(blocks))
            tail: PrefixNode | None = nodes[-1] if nodes else None
            for i, block in enumerate(blocks, len(nodes)):
                node = index.insert(tail, tokens[i * size : (i + 1) * size], block)
                if node is None or node.block is not block:
                    return False
                book.make_findable(block, node)
                tail = node
        finally:
            book.release(blocks)
    return True
