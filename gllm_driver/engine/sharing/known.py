"""Chunks a process has seen in its store, so that they are not copied from the device in vain."""

from __future__ import annotations

from collections import OrderedDict

from ...kv.store import KvChunkKey

MAX_CHUNKS = 1 << 16


class KnownChunks:
    """The last of them. Only a hint: what a store gave up meanwhile is forgotten when it is missed."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()  # seen longest ago first

    def __contains__(self, key: KvChunkKey) -> bool:
        return key.digest in self._digests

    def add(self, key: KvChunkKey) -> None:
        self._digests[key.digest] = None
        self._digests.move_to_end(key.digest)
        if len(self._digests) > MAX_CHUNKS:
            self._digests.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        self._digests.pop(digest, None)
