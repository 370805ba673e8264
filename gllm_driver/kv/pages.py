"""Pages of the KV cache as numbers: handed out, taken back, accounted for."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CapacityError


class PagePool:
    """A free list of page ids. Allocation and release are O(1) a page; any page serves as well as any other.

    The page freed last is handed out first, so a pool larger than its use touches little memory.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_tokens: int) -> list[int]:
        """Pages for `num_tokens` tokens. Raises CapacityError, taking nothing, when too few are free."""
        wanted = self.pages_for(num_tokens)
        if wanted > len(self._free):
            raise CapacityError(
                f"{num_tokens} tokens need {wanted} KV pages of {self.page_size}, {len(self._free)} of "
                f"{self.num_pages} are free: ask for fewer tokens or load the model with a larger context"
            )
        pages = [self._free.pop() for _ in range(wanted)]
        self._used.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Take pages back. Releasing a page twice is a bug and raises ValueError."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"KV page {page} is released but not in use")
            self._used.remove(page)
            self._free.append(page)

    def audit(self) -> None:
        """Raise AssertionError unless every page is in exactly one place."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & self._used, f"pages both free and used: {sorted(free & self._used)}"
        assert len(free) + len(self._used) == self.num_pages, "pages were lost"
