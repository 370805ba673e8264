"""A deterministic backend without a model: a token is a hash of the KV contents that are really stored in its pages.

Any mix-up of pages, positions, tokens or sampling options changes the output. `chunky` makes a token that is computed
alone store other bits than the same token inside a chunk, as decode and prefill kernels may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gllm_driver.backends.base import DecodeRow, KvCacheHandle, SampleRow, WeightsHandle
from gllm_driver.config import KvCacheConfig, SamplingConfig
from gllm_driver.errors import BackendError
from gllm_driver.types import F32, BatchInput, LogitsTensor, SequenceInput, Tensor

MASK = 2**64 - 1
WEIGHTS = (np.arange(1 << 14, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
VOCAB = 997
NO_NUMBER = VOCAB  # a sequence whose prompt begins with this many's neighbour has logits that hold no number


def mix(*values: int) -> int:
    """A hash of integers, 64 bits (the finalizer of splitmix64, chained)."""
    h = 0
    for value in values:
        h = (h ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ (h >> 29)) * 0x94D049BB133111EB & MASK
        h ^= h >> 32
    return h


@dataclass
class FakeBackend:
    """`fault(call)` is asked before every call of a backend method and may raise."""

    chunky: bool = False
    max_loop_rows: int | None = None
    fault: Callable[[str], None] = lambda call: None
    name: str = "fake"
    maps_weights: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    pages: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    slots: np.ndarray | None = None
    open_loops: int = 0

    def __post_init__(self) -> None:
        self._forwards = 0
        self.nan_tokens: set[int] = set()  # logits after one of these hold no number

    def _enter(self, call: str) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1
        self.fault(call)

    def alloc_kv_cache(self, config: KvCacheConfig) -> KvCacheHandle:
        self.pages = np.zeros((config.num_pages, config.page_size), np.uint64)
        return KvCacheHandle(config, Tensor(0, (config.num_pages,), F32))

    def alloc_swap_space(self, kv: KvCacheHandle, num_slots: int) -> None:
        self._enter("alloc_swap_space")
        self.slots = np.zeros((num_slots, kv.config.page_size), np.uint64)

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._enter("swap_out_pages")
        assert self.slots is not None
        assert len(pages) == len(slots)
        self.slots[list(slots)] = self.pages[list(pages)]

    def swap_in_pages(self, kv: KvCacheHandle, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._enter("swap_in_pages")
        assert self.slots is not None
        assert len(pages) == len(slots)
        self.pages[list(pages)] = self.slots[list(slots)]

    def page_stage(self, kv: KvCacheHandle, num_pages: int, num_buffers: int) -> FakeStage:
        return FakeStage(self, num_pages, num_buffers)

    def _compute(self, tokens: Sequence[int], position: int, pages: Sequence[int]) -> int:
        """Write the KV of some tokens; a hash of all KV up to the last of them."""
        page_size = self.pages.shape[1]
        assert len(pages) * page_size >= position + len(tokens), "too few pages for these tokens"
        assert len(set(pages)) == len(pages), "a page is listed twice"
        before = self.pages[list(pages[: -(-position // page_size)])].ravel()[:position]
        total = int((before * WEIGHTS[:position]).sum(dtype=np.uint64))
        alone = self.chunky and len(tokens) == 1
        for p, token in enumerate(tokens, position):
            value = mix(total, token, p, alone)
            self.pages[pages[p // page_size], p % page_size] = value
            total = (total + value * int(WEIGHTS[p])) & MASK
        return mix(total, *tokens[-1:], alone) | (1 << 64 if tokens[-1] in self.nan_tokens else 0)

    def batch_forward_gpu_pure(self, weights: object, kv: object, batch: BatchInput) -> list[LogitsTensor | None]:
        self._enter("forward")
        self._forwards += 1
        sums = [self._compute(s.tokens, s.position, s.pages) for s in batch.sequences]
        return [
            LogitsTensor(Tensor(h, (VOCAB,), F32), self._forwards) if s.wants_logits else None
            for h, s in zip(sums, batch.sequences, strict=True)
        ]

    def logits_forward(self, weights: object, kv: object, sequence: SequenceInput) -> np.ndarray:
        self._enter("logits_forward")
        out = []
        for i, token in enumerate(sequence.tokens):
            h = self._compute([token], sequence.position + i, sequence.pages)
            out.append(np.full(VOCAB, h % 1000, np.float32))
        return np.stack(out)

    def sample_rows(self, rows: Sequence[SampleRow]) -> list[int]:
        self._enter("sample")
        assert rows
        assert all(row.logits.generation == self._forwards for row in rows), "these logits were overwritten"
        return [choose(row.logits.row.address, row.sampling, row.position, row.prompt, row.output) for row in rows]

    def start_decode(self, weights: object, kv: object, rows: Sequence[DecodeRow]) -> FakeLoop:
        self._enter("start_decode")
        self._forwards += 1
        if self.max_loop_rows is not None and len(rows) > self.max_loop_rows:
            from gllm_driver.errors import UnsupportedError

            raise UnsupportedError(f"loops of {self.max_loop_rows} rows at most")
        self.open_loops += 1
        return FakeLoop(self, rows)

    def close(self) -> None:
        pass


class FakeBuffer:
    def __init__(self, stage: FakeStage, own: np.ndarray) -> None:
        self._stage, self._own, self.data = stage, own, own

    def wait(self) -> None:
        self._stage.backend._enter("wait")

    def __del__(self) -> None:
        self._stage.free.append(self._own)


class FakeStage:
    """Host buffers for pages; what is taken from them is scribbled over first."""

    def __init__(self, backend: FakeBackend, num_pages: int, num_buffers: int) -> None:
        self.backend = backend
        nbytes = backend.pages.shape[1] * 8
        self.free = list(np.zeros((num_buffers, num_pages, nbytes), np.uint8))

    def take(self) -> FakeBuffer | None:
        if not self.free:
            return None
        own = self.free.pop()
        own[:] = 0xAB
        return FakeBuffer(self, own)

    def hold(self, rows: np.ndarray) -> FakeBuffer | None:
        buffer = self.take()
        if buffer is not None:
            buffer.data[: len(rows)] = rows
        return buffer

    def to_host(self, pages: Sequence[int], buffer: FakeBuffer) -> None:
        self.backend._enter("to_host")
        buffer.data[: len(pages)] = self.backend.pages[list(pages)].view(np.uint8)

    def to_device(self, buffer: FakeBuffer, pages: Sequence[int], first: int = 0) -> None:
        self.backend._enter("to_device")
        rows = np.ascontiguousarray(buffer.data[first : first + len(pages)])
        assert len(rows) == len(pages)
        self.backend.pages[list(pages)] = rows.view(np.uint64)

    def close(self) -> None:
        self.free.clear()


class FakeLoop:
    def __init__(self, backend: FakeBackend, rows: Sequence[DecodeRow]) -> None:
        self._backend = backend
        self._rows = rows
        self._tokens = [row.token for row in rows]
        self._positions = [row.position for row in rows]
        self._pages = [list(row.pages) for row in rows]
        self._outputs = [list(row.output) for row in rows]
        self._is_open = True

    def step(self) -> list[int]:
        assert self._is_open, "a step of a closed loop"
        self._backend._enter("step")
        for i, row in enumerate(self._rows):
            h = self._backend._compute([self._tokens[i]], self._positions[i], self._pages[i])
            token = choose(h, row.sampling, self._positions[i], row.prompt, self._outputs[i])
            self._positions[i] += 1
            self._tokens[i] = token
            if row.sampling.has_penalties:
                self._outputs[i].append(token)
        return list(self._tokens)

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        assert self._is_open, "pages for a closed loop"
        self._pages[row] = list(pages)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._backend.open_loops -= 1


def choose(
    h: int, sampling: SamplingConfig, position: int, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> int:
    """The token of a hash; −1 where the fake logits hold no number."""
    if h >> 64:
        return -1
    if sampling.has_penalties:
        assert prompt, "penalties without the prompt"
        h = mix(h, *sorted(prompt), 7, *sorted(output))
    return mix(h, sampling.seed, position) % VOCAB


def broken(call: str) -> BackendError:
    return BackendError(f"injected fault in {call}")


WEIGHTS_HANDLE = WeightsHandle({}, VOCAB, None, 0)  # type: ignore[arg-type]
