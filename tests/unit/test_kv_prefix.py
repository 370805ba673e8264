"""Prefix reuse: what is found, what is not, that a collision is a miss, and what goes first when pages are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from kv_world import PAGE, World

from gllm_driver.kv.prefix import PrefixIndex

PROMPT = list(range(3 * PAGE))


def filled(world: World, seq_id: int, tokens: list[int]) -> None:
    world.open(seq_id, tokens)
    assert world.compute(seq_id, len(tokens))
    world.verify()


def test_a_key_is_the_chained_digest_of_the_definition() -> None:
    index = PrefixIndex(2, b"root")
    first = index.insert(None, (1, 2), "a")
    assert first is not None
    second = index.insert(first, (3, 4), "b")
    assert second is not None
    root = hashlib.sha256(b"gllm-driver KV prefix 1\0" + (2).to_bytes(8, "little") + b"root").digest()
    key = hashlib.sha256(root + b"".join(n.to_bytes(8, "little") for n in (1, 2))).digest()
    assert first.key == key
    assert second.key == hashlib.sha256(key + b"".join(n.to_bytes(8, "little") for n in (3, 4))).digest()


def test_another_root_finds_nothing() -> None:
    a, b = PrefixIndex(2, b"one"), PrefixIndex(2, b"two")
    node = a.insert(None, (1, 2), None)
    other = b.insert(None, (1, 2), None)
    assert node is not None
    assert other is not None
    assert node.key != other.key


def test_hits_are_whole_pages_and_leave_two_tokens() -> None:
    world = World(32, 0)
    filled(world, 1, PROMPT)
    for length, hit in ((1, 0), (PAGE, 0), (PAGE + 1, 0), (PAGE + 2, PAGE), (2 * PAGE + 1, PAGE), (3 * PAGE, 2 * PAGE)):
        assert world.kv.cached_tokens(PROMPT[:length]) == hit, length
    assert world.kv.cached_tokens([*PROMPT, 7, 7]) == 3 * PAGE
    assert world.kv.cached_tokens([*PROMPT[:PAGE], 99, *PROMPT[PAGE + 1 :]]) == PAGE
    assert world.kv.cached_tokens([99, *PROMPT[1:]]) == 0


def test_a_longer_and_a_shorter_request_share_what_they_have_in_common() -> None:
    world = World(32, 0)
    filled(world, 1, [*PROMPT, 50, 51])
    filled(world, 2, PROMPT[: 2 * PAGE + 2])
    filled(world, 3, [*PROMPT, 60, 61, 62])
    assert world.kv.pages(2)[:2] == world.kv.pages(1)[:2]
    assert world.kv.pages(3)[:3] == world.kv.pages(1)[:3]
    assert world.kv.pages(3)[3] != world.kv.pages(1)[3]
    assert world.kv.stats().num_shared == 3


def test_a_partly_filled_page_stays_private_until_it_is_full() -> None:
    world = World(32, 0)
    filled(world, 1, PROMPT[: PAGE + 1])
    assert world.kv.cached_tokens(PROMPT) == PAGE
    world.tokens[1] = PROMPT[: 2 * PAGE]
    assert world.compute(1, 2 * PAGE)
    assert world.kv.cached_tokens(PROMPT) == 2 * PAGE


def test_closed_sequences_are_found_until_their_pages_are_needed() -> None:
    world = World(4, 0)
    filled(world, 1, PROMPT)
    world.close(1)
    assert world.kv.pressure() == 0.0
    assert world.kv.stats().num_cached == 3
    filled(world, 2, [70, 71, 72, 73, 74])  # one page free, one more of the cached: the end of the chain
    assert world.kv.cached_tokens([*PROMPT, 1, 1]) == 2 * PAGE
    filled(world, 3, [*PROMPT[:PAGE], 80, 81])
    assert world.kv.stats().counters.prefix_tokens_hit == PAGE
    assert world.kv.cached_tokens([*PROMPT, 1, 1]) == PAGE


def test_the_prefix_used_longest_ago_goes_first_from_its_end() -> None:
    world = World(6, 0)
    old, young = [1] * (2 * PAGE), [2] * (2 * PAGE)
    filled(world, 1, old)
    filled(world, 2, young)
    world.close(1)
    world.close(2)
    left = []
    for seq_id in range(3, 9):
        filled(world, seq_id, [seq_id] * 2)
        left.append((world.kv.cached_tokens([*old, 0, 0]), world.kv.cached_tokens([*young, 0, 0])))
    assert [(a // PAGE, b // PAGE) for a, b in left] == [(2, 2), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]


def test_a_handle_holds_its_pages() -> None:
    world = World(4, 4)
    filled(world, 1, PROMPT)
    world.close(1)
    handle = world.kv.get_cached_kv_handle([*PROMPT, 5, 5])
    assert handle is not None
    assert handle.num_tokens == 3 * PAGE
    world.open(2, [9, 9])
    assert not world.kv.reserve(2, 2 * PAGE, ())
    assert world.kv.pressure() == 0.75
    world.kv.release(handle)
    assert world.kv.reserve(2, 2 * PAGE, ())
    assert world.kv.get_cached_kv_handle([3, 3, 3, 3, 3, 3]) is None
    world.kv.audit()


def test_two_that_computed_the_same_keep_their_own_pages_and_the_chain_goes_on() -> None:
    world = World(32, 0)
    world.open(1, PROMPT)
    world.open(2, [*PROMPT[: 2 * PAGE], 90, 91, 92, 93])
    assert world.compute(1, len(PROMPT))
    assert world.compute(2, 3 * PAGE)
    world.verify()
    assert not set(world.kv.pages(1)) & set(world.kv.pages(2))
    assert world.kv.cached_tokens([*PROMPT[: 2 * PAGE], 90, 91, 92, 93, 0, 0]) == 3 * PAGE
    world.close(1)  # now the first two pages are held by nobody, the third by sequence 2
    filled(world, 3, [*PROMPT[: 2 * PAGE], 90, 91, 92, 93, 7, 7])
    assert world.kv.pages(3)[2] == world.kv.pages(2)[2]


def weaken(world: World, digest: Callable[[bytes], bytes]) -> None:
    assert world.kv._index is not None
    world.kv._index._digest = digest


def collide(_: bytes) -> bytes:
    """The worst digest there is: everything has the same key."""
    return bytes(32)


def test_a_collision_of_keys_is_a_miss() -> None:
    world = World(32, 0)
    weaken(world, collide)
    filled(world, 1, [1] * (2 * PAGE))
    assert world.kv.cached_tokens([1] * (PAGE + 2)) == PAGE
    assert world.kv.cached_tokens([2] * (PAGE + 2)) == 0
    filled(world, 2, [2] * (3 * PAGE))
    filled(world, 3, [2] * (3 * PAGE))
    filled(world, 4, [1] * (3 * PAGE))
    assert not set(world.kv.pages(2)) & set(world.kv.pages(3))
    assert world.kv.pages(4)[0] == world.kv.pages(1)[0]


def test_equal_tokens_after_a_colliding_parent_are_a_miss() -> None:
    """Two first pages with one key, the same second page after each: the second belongs to one of them only."""

    def digest(data: bytes) -> bytes:
        words = [int.from_bytes(data[i : i + 8], "little") for i in range(32, len(data), 8)]
        return bytes(32) if words in ([1] * PAGE, [2] * PAGE) else hashlib.sha256(data).digest()

    world = World(32, 0)
    weaken(world, digest)
    ones, twos, same = [1] * PAGE, [2] * PAGE, [3] * PAGE
    filled(world, 1, [*ones, *same, 4])
    filled(world, 2, [*twos, *same, 4])
    assert world.kv.cached_tokens([*ones, *same, 4, 4]) == 2 * PAGE
    assert world.kv.cached_tokens([*twos, *same, 4, 4]) == 0
    filled(world, 4, [*twos, *[6] * PAGE, 4])  # must not be found as what follows the ones
    assert world.kv.cached_tokens([*ones, *[6] * PAGE, 4, 4]) == PAGE
    world.close(4)
    world.close(1)
    filled(world, 3, list(range(100, 100 + 29 * PAGE)))  # needs every page that nobody holds
    world.close(3)
    filled(world, 30, [*twos, 5])
    filled(world, 31, [*ones, *same, 4, 4])
    assert world.kv.cached_tokens([*ones, *same, 4, 4]) == 0
    assert world.kv.cached_tokens([*twos, 4, 4]) == PAGE


def test_reuse_can_be_off() -> None:
    world = World(8, 0, prefix_reuse=False)
    filled(world, 1, PROMPT)
    assert world.open(2, PROMPT) == 0
    assert world.kv.get_cached_kv_handle(PROMPT) is None
