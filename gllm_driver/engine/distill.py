"""KV pages merged by way of the host, for the KV manager: the backend's copies, and the arithmetic of kv/distill.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..backends.base import Backend, KvCacheHandle
from ..config import DistillConfig
from ..kv.distill import Rope, merge_pages
from ..kv.store.base import numpy_dtype


class BackendMerger:
    """PageMerger over a backend's cache (gllm_driver.kv.merging). num_computed(seq_id): tokens whose KV is there."""

    def __init__(
        self,
        backend: Backend,
        kv: KvCacheHandle,
        config: DistillConfig,
        rope: Rope | None,
        num_computed: Callable[[int], int],
    ) -> None:
        self.config = config
        self._rope = rope
        self._backend, self._kv = backend, kv
        self.num_computed = num_computed

    def read(self, pages: Sequence[int]) -> np.ndarray:
        """Merged pages, bytes [len(pages) / ratio, page_nbytes]. Raises BackendError."""
        old = page_arrays(self._backend.copy_pages_to_host(self._kv, pages), self._kv)
        ratio = self.config.ratio
        merged = [merge_pages(old[i : i + ratio], self._rope) for i in range(0, len(old), ratio)]
        return page_bytes(np.stack(merged))

    def write(self, merged: np.ndarray, pages: Sequence[int]) -> None:
        """Raises BackendError."""
        self._backend.copy_pages_from_host(self._kv, pages, merged)


def page_arrays(data: np.ndarray, kv: KvCacheHandle) -> np.ndarray:
    """Pages' bytes [N, page_nbytes] as numbers [N, L, 2, H, P, D], the same memory."""
    c = kv.config
    shape = (len(data), c.num_layers, 2, c.num_kv_heads, c.page_size, c.head_dim)
    return np.ascontiguousarray(data).reshape(-1).view(numpy_dtype(c.dtype)).reshape(shape)


def page_bytes(pages: np.ndarray) -> np.ndarray:
    """The other way round: u8 [N, page_nbytes]."""
    return np.ascontiguousarray(pages).view(np.uint8).reshape(len(pages), -1)
