"""CudaBackend: an NVIDIA GPU behind the Backend protocol. Weights, KV cache and logits never leave the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import KvCacheConfig, SamplingConfig
from ...driver.manifest import FOLDER
from ...driver.memory import size_text
from ...errors import CapacityError, UnsupportedError
from ...launch import WEIGHT_DTYPES
from ...types import DTYPES, F32, BatchInput, LogitsTensor, PageMetadata, SequenceInput, Tensor, Traffic
from ..base import (
    DecodeLoop,
    DecodeRow,
    KvCacheHandle,
    ModelWeights,
    Progress,
    SampleRow,
    WeightsHandle,
    checked,
    page_states,
)
from ..pooling import Pooling, embed, scores
from ..repack import repacked_weights
from .decode import DecoderPool
from .loop import CudaDecodeLoop
from .memory import free_nbytes, reserve
from .pages import PageCopies
from .pooling import CudaPooler
from .runtime import Runtime
from .sampling import Sampler
from .stage import CudaStage
from .steps import Steps
from .swap import SwapSpace, SwapStats
from .upload import upload


class CudaBackend:
    """Backend over device `index` (as the driver counts them, after CUDA_VISIBLE_DEVICES).

    deterministic: every reduction keeps one order whatever the batch, the chunking and the split, so that a result
    never depends on who shares its step; otherwise the fastest shapes are taken, which differ within rounding.
    use_graphs: replay decode steps as graphs; launching kernel by kernel gives the same results, more slowly.
    """

    maps_weights = False
    weight_dtypes = WEIGHT_DTYPES

    def __init__(
        self,
        index: int = 0,
        *,
        deterministic: bool = False,
        use_graphs: bool = True,
        progress: Progress | None = None,
        kernels: Path = FOLDER,
    ) -> None:
        """Raises BackendUnavailableError saying what is missing."""
        self.name = f"cuda:{index}"
        self._progress = progress
        self.runtime = Runtime(index, deterministic, use_graphs, kernels)
        self.device = self.runtime.device
        self._steps = Steps(self.runtime)
        self._decoders = DecoderPool(self.runtime)
        self._sampler = Sampler(self.runtime)
        self._swaps: dict[int, SwapSpace] = {}  # by id of the cache
        self._stages: dict[int, list[CudaStage]] = {}  # likewise
        self._spaces: dict[int, list[SwapSpace]] = {}  # likewise: that of swaps and those of stages
        self._copies: dict[int, PageCopies] = {}  # likewise
        self._loops: weakref.WeakSet[CudaDecodeLoop] = weakref.WeakSet()

    @property
    def numerics(self) -> str:
        about = self.device.properties
        major, minor = about.cc
        return f"cuda {major}.{minor} {about.num_sms} SMs {self.runtime.library.digest}"

    def upload_weights(
        self, model: ModelWeights, *, dtype: str = "auto", progress: Progress | None = None
    ) -> WeightsHandle:
        def report(done: int, total: int) -> None:
            if progress:
                progress("load", done, total)

        workers = os.cpu_count() or 1
        tensors = repacked_weights(model, self.weight_dtypes, dtype, workers, progress)
        model = dataclasses.replace(model, tensors=tensors)
        placed, nbytes = upload(self.runtime, model, dtype, report)
        report(nbytes, nbytes)  # padding between tensors is not copied, but counted
        return self._tracked(WeightsHandle(placed, model.vocab_size, model.forward, nbytes))

    def alloc_kv_cache(self, config: KvCacheConfig) -> KvCacheHandle:
        num_pages = config.num_pages + 1  # the last one is spare: what pads a step goes there
        nbytes, free = num_pages * config.page_nbytes, free_nbytes(self.device)
        if nbytes > free:
            raise CapacityError(
                f"a KV cache of {config.num_pages * config.page_size} tokens needs {size_text(nbytes)}, "
                f"{self.device.name} has {size_text(free)} free: ask for a smaller context"
            )
        buffer = reserve(self.device, nbytes, "the KV cache")
        shape = (num_pages, config.num_layers, 2, config.num_kv_heads, config.page_size, config.head_dim)
        with self.device:  # what was there before may be NaN, which a product with a zero weight would not hide
            self.device.fill(buffer.address, 0, nbytes, self.runtime.stream)
        return self._tracked(KvCacheHandle(config, Tensor(buffer.address, shape, DTYPES[config.dtype], buffer)))

    def _tracked(self, handle: Any) -> Any:
        """`handle`; what was made for it goes when it goes, before its id can belong to another."""
        steps, decoders, swaps, key = self._steps, self._decoders, self._swaps, id(handle)
        stages, copies, spaces = self._stages, self._copies, self._spaces

        def forget() -> None:
            steps.forget(key)
            decoders.forget(key)
            for stage in stages.pop(key, ()):
                stage.close()
            for held in (swaps.pop(key, None), copies.pop(key, None)):
                if held is not None:
                    held.close()
            spaces.pop(key, None)

        weakref.finalize(handle, forget).atexit = False
        return handle

    def generator_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput
    ) -> LogitsTensor:
        logits = self.batch_forward_gpu_pure(weights, kv, BatchInput([sequence]))[0]
        if logits is None:
            raise ValueError("a forward pass for logits was given a sequence that wants none")
        return logits

    def batch_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput
    ) -> list[LogitsTensor | None]:
        logits = self._forward(kv, batch.sequences, lambda: self._steps.run(weights, kv, batch.sequences))
        if logits is None:
            return [None] * len(batch.sequences)
        row, row_nbytes = itertools.count(), logits.row_nbytes
        return [
            LogitsTensor(
                Tensor(logits.address + next(row) * row_nbytes, logits.shape[1:], F32, logits.owner),
                self.runtime.num_forwards,
            )
            if sequence.wants_logits
            else None
            for sequence in batch.sequences
        ]

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        chunk = dataclasses.replace(sequence, wants_logits=False)
        self._forward(kv, [chunk], lambda: self._steps.run(weights, kv, [chunk]))

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        logits = self._forward(kv, [sequence], lambda: self._steps.run_all(weights, kv, sequence))
        assert logits is not None
        return self.to_host(logits)

    def _forward(
        self, kv: KvCacheHandle, sequences: Sequence[SequenceInput], run: Callable[[], Tensor | None]
    ) -> Tensor | None:
        """A forward pass in its place: logits of earlier ones are overwritten, copies of its pages come first."""
        self.runtime.num_forwards += 1
        for sequence in sequences:
            self._before(kv, sequence.pages, sequence.position // kv.config.page_size)
        return run()

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """A copy of a f32 or i32 array of the device, once all work queued before is done."""
        out = np.empty(tensor.shape, {"f32": np.float32, "i32": np.int32}[tensor.dtype.name])
        with self.device:
            self.runtime.stream.synchronize()
            self.device.copy_d2h(out.ctypes.data, tensor.address, out.nbytes)
        return out

    def sample_from_tensor(
        self,
        logits: LogitsTensor,
        config: SamplingConfig,
        *,
        position: int,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
    ) -> int:
        return self.sample_rows([SampleRow(logits, config, position, prompt, output)])[0]

    def sample_rows(self, rows: Sequence[SampleRow]) -> list[int]:
        if any(row.logits.generation != self.runtime.num_forwards for row in rows):
            raise ValueError("these logits were overwritten by a later forward pass: sample before the next one")
        return self._sampler.sample(rows) if rows else []

    def start_decode(self, weights: WeightsHandle, kv: KvCacheHandle, rows: Sequence[DecodeRow]) -> DecodeLoop:
        if not rows:
            raise ValueError("a decode loop has at least one row")
        self.runtime.num_forwards += 1
        before = functools.partial(self._before, kv)
        loop = CudaDecodeLoop(self.runtime, self._decoders, weights, kv, rows, before)
        self._loops.add(loop)
        return loop

    def prepare(self, dtypes: Iterable[str]) -> None:
        """Load every kernel module, which the first step would otherwise do; each has kernels for all dtypes."""
        self.runtime.library.load_all()

    def alloc_swap_space(self, kv: KvCacheHandle, num_slots: int) -> None:
        if old := self._swaps.pop(id(kv), None):
            kv.host_slots = None
            old.close()
        if num_slots:
            kv.host_slots = self._swaps[id(kv)] = SwapSpace(self.runtime, kv, num_slots, self._spaces_of(kv))

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._swap(kv).swap_out(pages, slots)
        self._keep_apart(kv, pages)

    def swap_in_pages(self, kv: KvCacheHandle, slots: Sequence[int], pages: Sequence[int]) -> None:
        self._swap(kv).swap_in(slots, pages)
        self._keep_apart(kv, pages)

    def swap_stats(self, kv: KvCacheHandle) -> SwapStats:
        """Pages, bytes and seconds of the swaps that are done."""
        return self._swap(kv).stats()

    def _swap(self, kv: KvCacheHandle) -> SwapSpace:
        if id(kv) not in self._swaps:
            raise UnsupportedError("this KV cache has no swap space: call alloc_swap_space first")
        return self._swaps[id(kv)]

    def _before(self, kv: KvCacheHandle, pages: Sequence[int], first_written: int = 0) -> None:
        """Steps to come use `pages` and write pages[first_written:]: copies under way that clash come first."""
        for space in self._spaces.get(id(kv), ()):
            space.before(pages, pages[first_written:])

    def _spaces_of(self, kv: KvCacheHandle) -> list[SwapSpace]:
        return self._spaces.setdefault(id(kv), [])

    def _keep_apart(self, kv: KvCacheHandle, pages: Sequence[int]) -> None:
        """A decode loop does not ask again before each step: if it has such pages, its next step waits."""
        if any(loop.uses(kv, pages) for loop in self._loops):
            self._before(kv, pages)

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageMetadata]:
        return page_states(kv)

    def get_memory_pressure(self) -> float:
        free, total = self.device.mem_info()
        return 1.0 - free / total

    def available_memory(self) -> int:
        return free_nbytes(self.device)

    def embedding_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, pooling: Pooling = "last"
    ) -> np.ndarray:
        with self._pooler(weights, kv, batch) as pooler:
            return embed(pooler, batch.sequences, pooling)

    def rerank_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, ids: Sequence[int] | None = None
    ) -> np.ndarray:
        tensors = weights.tensors
        output = tensors.get("lm_head", tensors["embed"])
        with self._pooler(weights, kv, batch) as pooler:
            return scores(pooler, batch.sequences, tensors.get("score"), output, ids)

    @contextlib.contextmanager
    def _pooler(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Iterator[CudaPooler]:
        def forward(parts: Sequence[SequenceInput]) -> Tensor:
            hidden = self._forward(kv, parts, lambda: self._steps.run_hidden(weights, kv, parts))
            assert hidden is not None
            return hidden

        hidden_size = weights.tensors["final_norm"].shape[-1]
        pooler = CudaPooler(self.runtime, forward, len(batch.sequences), hidden_size)
        try:
            yield pooler
        finally:
            pooler.close()

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        out = np.empty((len(pages), kv.config.page_nbytes), np.uint8)
        if len(pages):
            self._page_copies(kv, pages).to_host(pages, out)
        return out

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        rows = np.ascontiguousarray(np.broadcast_to(data, (len(pages), kv.config.page_nbytes)), np.uint8)
        if len(set(pages)) != len(pages):
            raise ValueError(f"a page comes twice: {sorted(pages)}")
        if len(pages):
            self._page_copies(kv, pages).from_host(pages, rows)

    def _page_copies(self, kv: KvCacheHandle, pages: Sequence[int]) -> PageCopies:
        """What moves pages of a cache, made when it is first wanted, after the copies of `pages` under way."""
        checked(pages, kv.config.num_pages, "page")
        self._before(kv, pages)
        if id(kv) not in self._copies:
            self._copies[id(kv)] = PageCopies(self.runtime, kv)
        return self._copies[id(kv)]

    def page_stage(self, kv: KvCacheHandle, num_pages: int, num_buffers: int) -> CudaStage:
        stage = CudaStage(self.runtime, kv, num_pages, num_buffers, self._spaces_of(kv))
        self._stages.setdefault(id(kv), []).append(stage)
        return stage

    def traffic(self) -> Traffic:
        stats = [space.stats() for spaces in tuple(self._spaces.values()) for space in tuple(spaces)]
        return dataclasses.replace(
            self.device.traffic(),
            kv_out_bytes=sum(s.nbytes_out for s in stats),
            kv_out_s=sum(s.seconds_out for s in stats),
            kv_in_bytes=sum(s.nbytes_in for s in stats),
            kv_in_s=sum(s.seconds_in for s in stats),
        )

    def close(self) -> None:
        self.runtime.close()
