"""Pages of the KV cache as numbers: handed out, shared, kept for a later hit, taken back, accounted for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ..errors import CapacityError


class PagePool:
    """Page ids with reference counts. Every operation is O(1) a page; any page serves as well as any other.

    A page is in exactly one place: *free*; *used*, by one or more holders; or *cached*, without a holder but kept
    (`keep`) because its contents can be found again, until `reclaim` takes the one released longest ago.
    The page freed last is handed out first, so a pool larger than its use touches little memory.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders: dict[int, int] = {}  # used page → how many hold it
        self._cached: OrderedDict[int, None] = OrderedDict()  # released longest ago first
        self._kept: set[int] = set()  # used or cached pages that do not become free by release
        self._num_shared = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one holder."""
        return len(self._holders)

    @property
    def num_shared(self) -> int:
        """Pages with more than one holder."""
        return self._num_shared

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that can be had without taking one from a holder."""
        return len(self._free) + len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many hold the page: 0 for a free or cached one."""
        return self._holders.get(page, 0)

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def allocate(self, num_tokens: int) -> list[int]:
        """Pages for `num_tokens` tokens. Raises CapacityError, taking nothing, when too few are free."""
        wanted = self.pages_for(num_tokens)
        if wanted > len(self._free):
            raise CapacityError(
                f"{num_tokens} tokens need {wanted} KV pages of {self.page_size}, {len(self._free)} of "
                f"{self.num_pages} are free: ask for fewer tokens or load the model with a larger context"
            )
        return self.take(wanted)

    def take(self, count: int) -> list[int]:
        """`count` free pages with one holder each. Raises CapacityError, taking nothing, when too few are free."""
        if count > len(self._free):
            raise CapacityError(f"{count} KV pages are wanted, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update((page, 1) for page in pages)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each page, used or cached. Retaining a free page is a bug and raises ValueError."""
        for page in pages:
            count = self._holders.get(page, 0)
            if count == 0:
                if page not in self._cached:
                    raise ValueError(f"KV page {page} is retained but free")
                del self._cached[page]
            self._holders[page] = count + 1
            self._num_shared += count == 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less; a page without holders becomes free, or cached if it is kept.

        Releasing a page nobody holds is a bug and raises ValueError. The page released first is reclaimed first.
        """
        for page in pages:
            count = self._holders.get(page, 0)
            if count == 0:
                raise ValueError(f"KV page {page} is released but not in use")
            self._num_shared -= count == 2
            if count > 1:
                self._holders[page] = count - 1
                continue
            del self._holders[page]
            if page in self._kept:
                self._cached[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """A used page's contents can be found again: cache it when its last holder lets go."""
        if page not in self._holders:
            raise ValueError(f"KV page {page} is to be kept but not in use")
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """The contents can no longer be found: a cached page becomes free, a used one will."""
        self._kept.discard(page)
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def oldest_cached(self) -> int:
        """The cached page released longest ago; `forget` it to make it free."""
        return next(iter(self._cached))

    def audit(self) -> None:
        """Raise AssertionError unless every page is in exactly one place."""
        free, used, cached = set(self._free), set(self._holders), set(self._cached)
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert not free & used, f"pages both free and used: {sorted(free & used)}"
        assert not free & cached, f"pages both free and cached: {sorted(free & cached)}"
        assert not used & cached, f"pages both used and cached: {sorted(used & cached)}"
        assert cached <= self._kept, f"pages cached but not kept: {sorted(cached - self._kept)}"
        assert not self._kept & free, f"pages both free and kept: {sorted(self._kept & free)}"
        assert all(count > 0 for count in self._holders.values()), "a used page has no holder"
        assert self._num_shared == sum(count > 1 for count in self._holders.values()), "shared pages are miscounted"
        assert len(free) + len(used) + len(cached) == self.num_pages, "pages were lost"
