"""What is shared through a KV store, and how much anybody may be held up by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...kv.store import CHUNK_TOKENS, KvChunkKey, KvRoot, KvStore, chunk_keys

MAX_BUFFERS = 32  # in each direction


@dataclass(frozen=True)
class KvSharingConfig:
    """What is shared, and how much a step or a request may be held up by it.

    chunk_tokens: of a chunk, by which KV is stored. min_tail_tokens: the end of a prompt after its last whole chunk is
    stored when it is that long. buffer_nbytes: host memory for what is under way in each direction. max_wait_s: a
    request waits at most so long for the store, and never longer than computing should take, but at least min_wait_s.
    step_s: copies of one step on a device whose copies are done at once. flush_s: how long closing waits for what is
    not saved yet. load_always: without asking whether it pays.
    """

    store: KvStore
    root: KvRoot
    chunk_tokens: int = CHUNK_TOKENS
    min_tail_tokens: int = 64
    buffer_nbytes: int = 128 << 20
    max_wait_s: float = 10.0
    min_wait_s: float = 0.1
    step_s: float = 0.004
    flush_s: float = 5.0
    load_always: bool = False

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.chunk_tokens % self.root.layout.page_size:
            raise ValueError(
                f"a chunk must be whole pages of {self.root.layout.page_size} tokens, got {self.chunk_tokens} tokens"
            )

    @property
    def chunk_pages(self) -> int:
        return self.chunk_tokens // self.root.layout.page_size

    @property
    def num_buffers(self) -> int:
        return max(2, min(MAX_BUFFERS, self.buffer_nbytes // (self.chunk_pages * self.root.layout.page_nbytes)))

    @property
    def page_size(self) -> int:
        return self.root.layout.page_size

    @property
    def least_tokens(self) -> int:
        """Of a chunk that is worth storing."""
        return min(self.min_tail_tokens, self.chunk_tokens)

    def keys(self, prompt: Sequence[int]) -> list[KvChunkKey]:
        """Of the whole chunks of a prompt, and of its end if that is long enough."""
        keys = chunk_keys(self.root, prompt, chunk_tokens=self.chunk_tokens, tail=True)
        if keys and keys[-1].num_tokens < self.least_tokens:
            keys.pop()
        return keys
