"""The page pool: nothing is lost, nothing is handed out twice, whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gllm_driver.errors import CapacityError
from gllm_driver.kv.pages import PagePool


def test_pages_for_rounds_up() -> None:
    pool = PagePool(4, 16)
    assert [pool.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_refusal_takes_nothing_and_names_the_figures() -> None:
    pool = PagePool(2, 16)
    held = pool.allocate(17)
    with pytest.raises(CapacityError, match="1 tokens need 1 KV pages of 16, 0 of 2 are free"):
        pool.allocate(1)
    pool.audit()
    pool.release(held)
    assert pool.num_free == 2


def test_double_release_is_refused() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(16)
    pool.release(pages)
    with pytest.raises(ValueError, match="not in use"):
        pool.release(pages)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=60))
def test_audit_holds_after_every_operation(operations: list[tuple[bool, int]]) -> None:
    pool = PagePool(10, 8)
    held: list[list[int]] = []
    for allocate, amount in operations:
        if allocate:
            try:
                held.append(pool.allocate(amount))
            except CapacityError:
                assert pool.pages_for(amount) > pool.num_free
        elif held:
            pool.release(held.pop(amount % len(held)))
        pool.audit()
        in_use = [page for pages in held for page in pages]
        assert len(set(in_use)) == len(in_use)
        assert len(in_use) + pool.num_free == 10
