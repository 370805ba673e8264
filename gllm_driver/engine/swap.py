"""KV pages to host memory and back, for the KV manager: the backend's copies bound to one cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..backends.base import Backend, KvCacheHandle
from ..config import SwapConfig
from ..errors import BackendError, CapacityError, UnsupportedError

log = logging.getLogger("gllm_driver")

MAX_SLOTS_PER_PAGE = 4  # more host slots than this for each page of the device are never of use


class Swapper:
    """Copies pages. Host memory is taken when the first page is to go there: most processes never swap.

    Raises BackendError when a copy fails, or when there is no host memory to be had: the KV is then to be computed
    again.
    """

    def __init__(self, backend: Backend, kv: KvCacheHandle, config: SwapConfig) -> None:
        self._backend = backend
        self._kv = kv
        self._has_space = False
        self._refusal: str | None = None  # why there is no host memory, once that is known
        wanted = config.num_host_slots(kv.config.page_nbytes)
        self.num_slots = min(wanted, MAX_SLOTS_PER_PAGE * kv.config.num_pages)

    def swap_out(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy pages to host slots."""
        if self._refusal is not None:
            raise BackendError(self._refusal)
        if not self._has_space:
            try:
                self._backend.alloc_swap_space(self._kv, self.num_slots)
            except (CapacityError, UnsupportedError) as error:
                log.warning("KV pages cannot be swapped and will be computed again: %s", error)
                self._refusal = str(error)
                raise BackendError(self._refusal) from error
            self._has_space = True
        self._backend.swap_out_pages(self._kv, pages, slots)

    def swap_in(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host slots to pages."""
        self._backend.swap_in_pages(self._kv, slots, pages)
