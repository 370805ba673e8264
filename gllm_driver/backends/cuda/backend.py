"""CudaBackend: an NVIDIA GPU behind the Backend protocol. Weights, KV cache and logits never leave the device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import KvCacheConfig, SamplingConfig
from ...driver.manifest import FOLDER
from ...driver.memory import size_text
from ...errors import CapacityError, UnsupportedError
from ...launch import WEIGHT_DTYPES
from ...ops.sample import PARAM_WORDS, pack_params, token_counts
from ...types import (
    DTYPES,
    F32,
    I32,
    I64,
    BatchInput,
    LogitsTensor,
    PageMetadata,
    SequenceInput,
    Tensor,
    Traffic,
)
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
from .decode import CudaDecodeLoop, DecoderPool
from .memory import Mirror, free_nbytes, reserve
from .runtime import Runtime
from .steps import Steps, table_width
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
        self._choice: Mirror | None = None
        self._forwards = 0

    def upload_weights(
        self, model: ModelWeights, *, dtype: str = "auto", progress: Progress | None = None
    ) -> WeightsHandle:
        def report(done: int, total: int) -> None:
            if progress:
                progress("load", done, total)

        tensors, nbytes = upload(self.device, self.runtime.stream, model, dtype, report)
        report(nbytes, nbytes)  # padding between tensors is not copied, but counted
        return self._tracked(WeightsHandle(tensors, model.vocab_size, model.forward, nbytes))

    def alloc_kv_cache(self, config: KvCacheConfig) -> KvCacheHandle:
        free = free_nbytes(self.device)
        if config.nbytes > free:
            raise CapacityError(
                f"a KV cache of {config.num_pages * config.page_size} tokens needs {size_text(config.nbytes)}, "
                f"{self.device.name} has {size_text(free)} free: ask for a smaller context"
            )
        buffer = reserve(self.device, config.nbytes, "the KV cache")
        shape = (
            config.num_pages,
            config.num_layers,
            2,
            config.num_kv_heads,
            config.page_size,
            config.head_dim,
        )
        with self.device:  # what was there before may be NaN, which a product with a zero weight would not hide
            self.device.fill(buffer.address, 0, config.nbytes, self.runtime.stream)
        return self._tracked(KvCacheHandle(config, Tensor(buffer.address, shape, DTYPES[config.dtype], buffer)))

    def _tracked(self, handle: Any) -> Any:
        """`handle`; programs recorded for it go when it goes, before its id can belong to another."""
        steps, decoders, key = self._steps, self._decoders, id(handle)

        def forget() -> None:
            steps.forget(key)
            decoders.forget(key)

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
        self._forwards += 1
        logits = self._steps.run(weights, kv, batch.sequences, "last").logits
        assert logits is not None
        return [
            LogitsTensor(
                Tensor(logits.address + i * logits.row_nbytes, logits.shape[1:], F32, logits.owner), self._forwards
            )
            if sequence.wants_logits
            else None
            for i, sequence in enumerate(batch.sequences)
        ]

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        self._forwards += 1
        self._steps.run(weights, kv, [sequence], "none")

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        self._forwards += 1
        logits = self._steps.run(weights, kv, [sequence], "all").logits
        assert logits is not None
        return self.to_host(logits)

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
        if logits.generation != self._forwards:
            raise ValueError("these logits were overwritten by a later forward pass: sample before the next one")
        V = logits.row.shape[0]
        if self._choice is None:
            fields = [("params", (1, PARAM_WORDS), I32), ("positions", (1,), I64), ("tokens", (1,), I32)]
            self._choice = Mirror(self.device, fields)
        choice = self._choice
        arrays: dict[str, Tensor | None] = {name: choice.tensor(name) for name in ("params", "positions", "tokens")}
        arrays["logits"] = Tensor(logits.row.address, (1, V), F32, logits.row.owner)
        if config.has_penalties:
            counts = token_counts(prompt, output, V)[np.newaxis]
            buffer = reserve(self.device, counts.nbytes, "the counts of tokens")
            self.device.copy_h2d(buffer.address, counts.ctypes.data, counts.nbytes)
            arrays["counts"] = Tensor(buffer.address, counts.shape, I32, buffer)
        program = self.runtime.program()
        program.add("sample", arrays)
        program.finish()
        with self.device:
            host = choice.host()
            host["params"][:] = pack_params([config])
            host["positions"][:] = position
            choice.upload(self.runtime.stream)
            program.issue()
        return int(self.to_host(choice.tensor("tokens"))[0])

    def sample_rows(self, rows: Sequence[SampleRow]) -> list[int]:
        return [
            self.sample_from_tensor(
                row.logits, row.sampling, position=row.position, prompt=row.prompt, output=row.output
            )
            for row in rows
        ]

    def start_decode(self, weights: WeightsHandle, kv: KvCacheHandle, rows: Sequence[DecodeRow]) -> DecodeLoop:
        if len(rows) != 1:
            raise UnsupportedError("the CUDA backend continues one sequence at a time")
        row = rows[0]
        self._forwards += 1  # the loop writes where the logits of forward passes are
        width = table_width(len(row.pages), kv.config.num_pages)
        decoder, idle = self._decoders.take(weights, kv, width, row.sampling.has_penalties)
        loop = CudaDecodeLoop(decoder, idle)
        decoder.start(row)
        return loop

    def prepare(self, dtypes: Iterable[str]) -> None:
        """Load every kernel module, which the first step would otherwise do; each has kernels for all dtypes."""
        self.runtime.library.load_all()

    def alloc_swap_space(self, kv: KvCacheHandle, num_slots: int) -> None:
        raise UnsupportedError("the CUDA backend does not swap KV pages yet")

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int], slots: Sequence[int]) -> None:
        raise UnsupportedError("the CUDA backend does not swap KV pages yet")

    def swap_in_pages(self, kv: KvCacheHandle, slots: Sequence[int], pages: Sequence[int]) -> None:
        raise UnsupportedError("the CUDA backend does not swap KV pages yet")

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageMetadata]:
        return page_states(kv)

    def get_memory_pressure(self) -> float:
        free, total = self.device.mem_info()
        return 1.0 - free / total

    def available_memory(self) -> int:
        return free_nbytes(self.device)

    def embedding_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        raise UnsupportedError("the CUDA backend does not compute embeddings yet")

    def rerank_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        raise UnsupportedError("the CUDA backend does not rerank yet")

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        nbytes = kv.config.page_nbytes
        out = np.empty((len(pages), nbytes), np.uint8)
        with self.device:
            self.runtime.stream.synchronize()
            for row, page in zip(out, checked(pages, kv.config.num_pages, "page"), strict=True):
                self.device.copy_d2h(row.ctypes.data, kv.tensor.address + page * nbytes, nbytes)
        return out

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        nbytes = kv.config.page_nbytes
        rows = np.ascontiguousarray(np.broadcast_to(data, (len(pages), nbytes)), np.uint8)
        with self.device:
            self.runtime.stream.synchronize()
            for row, page in zip(rows, checked(pages, kv.config.num_pages, "page"), strict=True):
                self.device.copy_h2d(kv.tensor.address + page * nbytes, row.ctypes.data, nbytes)

    def traffic(self) -> Traffic:
        return self.device.traffic()

    def close(self) -> None:
        self.runtime.close()
