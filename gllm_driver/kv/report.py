"""What the KV manager's records say: page states, fragmentation, and the audit that they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ..types import PageMetadata, PageState
from .groups import Block, Group, as_block
from .pages import PagePool
from .prefix import PrefixNode
from .swap import VictimPolicy

# A page shared by several sequences shows the state that protects it most.
PROTECTION = (PageState.SWAPPED, PageState.STANDBY, PageState.ACTIVE, PageState.WARM, PageState.PROTECTED)


def page_states(pool: PagePool, groups: Iterable[Group], policy: VictimPolicy, now: float) -> dict[int, PageMetadata]:
    """Every device page by id (free and cached ones are Standby), every host slot in use by `num_pages + slot`."""
    owners: dict[int, list[Group]] = {page: [] for page in range(pool.num_pages)}
    sinks: set[int] = set()
    for group in groups:
        ids = group.own_pages() or [pool.num_pages + block.slot for block in group.blocks if block.slot is not None]
        sinks.update(ids[:1])
        for page in ids:
            owners.setdefault(page, []).append(group)
    return {page: _metadata(page, of, policy, now, is_sink=page in sinks) for page, of in owners.items()}


def _metadata(page: int, owners: list[Group], policy: VictimPolicy, now: float, *, is_sink: bool) -> PageMetadata:
    if not owners:
        return PageMetadata(page, None, PageState.STANDBY)
    first = max(owners, key=lambda group: PROTECTION.index(group.state.at(now)))
    times = [group.state.last_access for group in owners if group.state.last_access is not None]
    return PageMetadata(
        page_id=page,
        sequence_id=first.seq_id if len(owners) == 1 else None,
        state=first.state.at(now),
        recency=min(policy.recency(group.seq_id) for group in owners),
        is_lir=any(policy.is_lir(group.seq_id) for group in owners),
        swap_in_time=first.state.swap_in_time,
        warm_until=first.state.warm_until,
        access_count=sum(group.state.access_count for group in owners),
        last_access=max(times, default=None),
        is_attention_sink=is_sink,
    )


def fragmentation(pool: PagePool, groups: Iterable[Group]) -> float:
    """Share of the token room in pages of sequences on the device that they did not reserve."""
    room = unused = 0
    for group in groups:
        room += len(group.own_pages()) * pool.page_size
        unused += len(group.pages) * pool.page_size - group.num_tokens if group.pages else 0
    return unused / room if room else 0.0


def audit(
    pool: PagePool,
    host: PagePool,
    groups: Mapping[int, Group],
    blocks: Mapping[int, Block],
    index: Iterable[PrefixNode],
) -> None:
    """Raise AssertionError unless pages, slots, blocks, groups and index agree."""
    pool.audit()
    host.audit()
    assert host.num_cached == 0, "host slots are never cached"
    assert len(blocks) == pool.num_used + pool.num_cached, "a page in use has no block, or a free one has"
    for page, block in blocks.items():
        assert block.page == page, f"page {page} belongs to a block that says {block.page}"
    holders: Counter[int] = Counter()
    swapped: Counter[int] = Counter()
    on_host: dict[int, Block] = {}
    for group in groups.values():
        num_pages = sum(block.repeat for block in group.blocks)
        assert group.num_tokens <= num_pages * pool.page_size, "tokens reserved without a page"
        assert group.is_distilled or num_pages == len(group.blocks), "merged pages in a sequence that knows of none"
        assert not (group.is_distilled and group.is_findable), "what follows merged pages can be found"
        assert len(set(map(id, group.blocks))) == len(group.blocks), "a block twice in a sequence"
        if group.is_resident:
            own = group.own_pages()
            assert group.pages == group.table(), f"pages of sequence {group.seq_id} differ"
            holders.update(own)
            assert all(blocks[page] is block for page, block in zip(own, group.blocks, strict=True))
        else:
            assert not group.pages, f"sequence {group.seq_id} is on the host and has pages"
            for block in group.blocks:
                assert block.slot is not None, f"sequence {group.seq_id} is on the host without a copy"
                assert on_host.setdefault(block.slot, block) is block, f"host slot {block.slot} has two blocks"
                swapped[block.slot] += 1
    assert len(on_host) == host.num_used, "host slots were lost"
    for slot, count in swapped.items():
        assert on_host[slot].num_swapped == count, f"host slot {slot} is miscounted"
    assert len(holders) == pool.num_used, "pages are held by nobody known"
    for page, count in holders.items():
        assert pool.holders(page) == count, f"page {page} has {count} sequences, the pool counts {pool.holders(page)}"
    for page, block in blocks.items():
        if block.repeat > 1:
            assert block.node is None, f"page {page} holds merged tokens and can be found"
            assert pool.holders(page) == 1, f"page {page} holds merged tokens and is shared"
    indexed = 0
    for node in index:
        block = as_block(node.block)
        assert block.node is node, "a block and its node disagree"
        assert block.page is not None, "a page that is not on the device can be found"
        assert node.parent is None or node.parent.is_indexed, "a node follows one that is gone"
        indexed += 1
    assert indexed == sum(block.node is not None for block in blocks.values()), "a block has a node out of the index"
