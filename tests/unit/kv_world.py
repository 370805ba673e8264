"""A stand-in for engine and backend that really holds KV contents, so that a wrong page shows as wrong contents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gllm_driver.config import SwapConfig
from gllm_driver.errors import BackendError
from gllm_driver.kv.manager import KvManager
from gllm_driver.kv.merging import PageMerger
from gllm_driver.kv.pages import PagePool
from gllm_driver.kv.swap import VictimPolicy

PAGE = 4


class World:
    """A KV cache of one number a token: a digest of all tokens up to it, as attention would make it depend on them."""

    def __init__(
        self,
        num_pages: int,
        num_slots: int,
        config: SwapConfig | None = None,
        *,
        prefix_reuse: bool = True,
        policy: VictimPolicy | None = None,
        merger: PageMerger | None = None,
    ) -> None:
        self.device = np.full((num_pages, PAGE), -1, np.int64)
        self.host = np.full((num_slots, PAGE), -1, np.int64)
        self.now = 0.0
        self.fail_next = 0  # copies to fail
        self.copies: list[tuple[str, int]] = []
        self.tokens: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.kv = KvManager(
            PagePool(num_pages, PAGE),
            self,
            config or SwapConfig(),
            num_host_slots=num_slots,
            root_key=b"test",
            clock=lambda: self.now,
            prefix_reuse=prefix_reuse,
            policy=policy,
            merger=merger,
        )

    # PageCopier

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._copy("out", pages, slots)
        self.host[list(slots)] = self.device[list(pages)]

    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._copy("in", pages, slots)
        self.device[list(pages)] = self.host[list(slots)]

    def _copy(self, way: str, pages: Sequence[int], slots: Sequence[int]) -> None:
        assert len(pages) == len(slots) == len(set(pages)) == len(set(slots)) > 0
        if self.fail_next:
            self.fail_next -= 1
            raise BackendError(f"swap-{way} of {len(pages)} pages failed: injected")
        self.copies.append((way, len(pages)))

    # What an engine does

    def open(self, seq_id: int, tokens: Sequence[int]) -> int:
        self.tokens[seq_id] = list(tokens)
        self.computed[seq_id] = self.kv.open(seq_id, tokens)
        return self.computed[seq_id]

    def compute(self, seq_id: int, num_tokens: int, running: Sequence[int] = ()) -> bool:
        """Compute up to `num_tokens` tokens in total, if room can be had; the sequence must be on the device."""
        before = len(self.kv.pages(seq_id))
        if not self.kv.reserve(seq_id, num_tokens, running):
            return False
        self.kv.touch((seq_id,))
        pages = self.kv.pages(seq_id)
        self.device[list(pages[before:])] = -1  # what they held is nobody's any more
        for i in range(self.computed[seq_id], num_tokens):
            self.device[pages[i // PAGE], i % PAGE] = self.value(seq_id, i)
        self.computed[seq_id] = num_tokens
        self.kv.commit(seq_id, self.tokens[seq_id], num_tokens)
        self.kv.idle((seq_id,))
        return True

    def close(self, seq_id: int) -> None:
        self.kv.close(seq_id)
        del self.tokens[seq_id], self.computed[seq_id]

    def drop(self, seq_id: int) -> None:
        self.kv.drop(seq_id)
        self.open(seq_id, self.tokens[seq_id])

    def value(self, seq_id: int, position: int) -> int:
        return hash(tuple(self.tokens[seq_id][: position + 1])) & 0xFFFFFFFF

    def verify(self) -> None:
        """Every resident sequence's contents are what was written."""
        self.kv.audit()
        for seq_id, count in self.computed.items():
            if self.kv.is_resident(seq_id):
                pages = self.kv.pages(seq_id)
                found = [int(self.device[pages[i // PAGE], i % PAGE]) for i in range(count)]
                assert found == [self.value(seq_id, i) for i in range(count)], f"sequence {seq_id}"
