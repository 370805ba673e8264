"""Records of the KV manager: what a page holds and where that is, what a sequence has, and the counters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .prefix import PrefixNode
from .states import GroupState

THRASH_S = 0.1  # a swap-out so soon after the swap-in of the same sequence was for nothing


@dataclass(eq=False, slots=True)
class Block:
    """The contents of one page, wherever they are: on the device, in a host slot, or both.

    With a page and no resident sequence it is cached. With a slot it belongs to `num_swapped` sequences on the host.
    A block shared by several sequences is full and never written again, so its two copies stay equal. One that holds
    merged tokens belongs to one sequence, and stands for `repeat` pages of it.
    """

    page: int | None
    slot: int | None = None
    num_swapped: int = 0
    node: PrefixNode | None = None
    repeat: int = 1


@dataclass(eq=False, slots=True)
class Group:
    """All pages of one sequence. Resident: every block has a page. Otherwise every block has a slot."""

    seq_id: int
    state: GroupState
    blocks: list[Block] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # the page table, while resident
    is_resident: bool = True
    is_pinned: bool = False
    was_missed: bool = False  # not on the device when it was wanted; until the access it was wanted for
    num_tokens: int = 0  # reserved
    num_indexed: int = 0  # leading blocks whose tokens are in the prefix index
    tail: PrefixNode | None = None  # node of the last of them
    is_findable: bool = True  # False after a hash collision, or with KV that is not exact: nothing more is indexed
    is_distilled: bool = False  # some blocks hold merged tokens
    is_lost: bool = False  # its KV went wrong: to be computed again. It counts as being on the host

    def table(self) -> list[int]:
        """The pages of blocks on the device as attention reads them: merged ones as often as they stand for one."""
        if not self.is_distilled:
            return pages_of(self.blocks)
        return [block.page for block in self.blocks if block.page is not None for _ in range(block.repeat)]

    def own_pages(self) -> list[int]:
        """The same, each page once."""
        return pages_of(self.blocks) if self.is_distilled else self.pages


@dataclass
class Counters:
    """What happened since the start."""

    groups_swapped_out: int = 0
    groups_swapped_in: int = 0
    pages_swapped_out: int = 0
    pages_swapped_in: int = 0
    num_thrashed: int = 0  # swapped out within THRASH_S of a swap-in
    swap_out_s: float = 0.0
    swap_in_s: float = 0.0
    num_swap_outs: int = 0  # copies asked of the backend
    num_swap_ins: int = 0
    working_set_accesses: int = 0  # of sequences accessed within the window before
    working_set_hits: int = 0  # of those, on sequences that were on the device
    prefix_tokens_asked: int = 0
    prefix_tokens_hit: int = 0
    cached_pages_evicted: int = 0
    groups_distilled: int = 0
    pages_distilled: int = 0  # that sequences have less by it
    copy_failures: int = 0


@dataclass(frozen=True)
class KvStats:
    """Pages by place now, and what happened since the start."""

    num_pages: int
    num_free: int
    num_used: int
    num_shared: int
    num_cached: int
    num_host_slots: int
    num_swapped: int  # host slots in use
    fragmentation: float  # share of the tokens' room in used pages that nobody reserved
    counters: Counters

    @property
    def prefix_hit_rate(self) -> float:
        return _share(self.counters.prefix_tokens_hit, self.counters.prefix_tokens_asked)

    @property
    def thrash_rate(self) -> float:
        """Share of the swap-outs that follow a swap-in of the same sequence within 100 ms."""
        return _share(self.counters.num_thrashed, self.counters.groups_swapped_out)

    @property
    def working_set_hit_rate(self) -> float:
        """Share of accesses within the working-set window of the last one that found the sequence on the device."""
        counters = self.counters
        return (
            _share(counters.working_set_hits, counters.working_set_accesses) if counters.working_set_accesses else 1.0
        )

    @property
    def mean_swap_out_s(self) -> float:
        return self.counters.swap_out_s / max(1, self.counters.num_swap_outs)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def pages_of(blocks: Iterable[Block]) -> list[int]:
    """The device pages of blocks, those without one left out."""
    return [block.page for block in blocks if block.page is not None]


def as_block(value: Any) -> Block:
    """The block a prefix node was inserted with."""
    assert isinstance(value, Block)
    return value
