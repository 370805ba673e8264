"""Full pages found again by the tokens they hold: chained SHA-256 keys, verified by the token ids themselves."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class PrefixNode:
    """One full page in the index, after its parent's tokens. `block` is the caller's; the index never looks into it."""

    __slots__ = ("block", "children", "is_indexed", "key", "parent", "tokens")

    def __init__(self, key: bytes, tokens: tuple[int, ...], parent: PrefixNode | None, block: Any) -> None:
        self.key = key
        self.tokens = tokens
        self.parent = parent
        self.children: dict[bytes, PrefixNode] = {}
        self.block = block
        self.is_indexed = True


class PrefixIndex:
    """Pages by the tokens before and in them.

    The key of a page is SHA-256(key of the page before, token ids as int64 little-endian), where the first page follows
    a digest of `root_key` (weights, dtype, RoPE, KV format) and the page size. A key found is a hit only if the token
    ids are equal and the node's parent is the node matched before, so by induction the whole prefix is compared and a
    collision is a miss.
    """

    def __init__(self, page_size: int, root_key: bytes, digest: Callable[[bytes], bytes] = sha256) -> None:
        self.page_size = page_size
        self._digest = digest
        self._root = digest(b"gllm-driver KV prefix 1\0" + page_size.to_bytes(8, "little") + root_key)
        self._nodes: dict[bytes, PrefixNode] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int], max_pages: int) -> list[PrefixNode]:
        """Nodes of the longest indexed prefix of `tokens`, at most `max_pages` full pages of it."""
        found: list[PrefixNode] = []
        parent: PrefixNode | None = None
        for i in range(min(max_pages, len(tokens) // self.page_size)):
            span = tuple(tokens[i * self.page_size : (i + 1) * self.page_size])
            node = self._nodes.get(self._key(parent, span))
            if node is None or node.tokens != span or node.parent is not parent:
                break
            found.append(node)
            parent = node
        return found

    def insert(self, parent: PrefixNode | None, span: Sequence[int], block: Any) -> PrefixNode | None:
        """The node of the page holding `span` after `parent`: the one there is, or a new one for `block`.

        None when another page has the same key (a collision): this page cannot be found, nor what follows it.
        """
        tokens = tuple(span)
        key = self._key(parent, tokens)
        node = self._nodes.get(key)
        if node is None:
            node = PrefixNode(key, tokens, parent, block)
            self._nodes[key] = node
            if parent is not None:
                parent.children[key] = node
        elif node.tokens != tokens or node.parent is not parent:
            return None
        return node

    def remove(self, node: PrefixNode) -> Iterator[PrefixNode]:
        """Take a node out of the index, and all that follow it, which could not be found without it; yields them."""
        if node.parent is not None:
            node.parent.children.pop(node.key, None)
        stack = [node]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            node.children.clear()
            node.is_indexed = False
            del self._nodes[node.key]
            yield node

    def __iter__(self) -> Iterator[PrefixNode]:
        return iter(self._nodes.values())

    def _key(self, parent: PrefixNode | None, tokens: tuple[int, ...]) -> bytes:
        numbers = array("q", tokens)
        if sys.byteorder == "big":
            numbers.byteswap()
        return self._digest((parent.key if parent is not None else self._root) + numbers.tobytes())
