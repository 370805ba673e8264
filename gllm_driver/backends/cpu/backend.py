"""CpuBackend: the CPU behind the Backend protocol. "Device memory" is host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np

from cpu_backend.compile import source_key
from cpu_backend.kernels import WEIGHT_DTYPES, all_entries
from cpu_backend.memory import available_nbytes, memory_pressure
from cpu_backend.program import Program
from cpu_backend.team import Team, aligned
from cpu_backend.upload import Uploader, placed

from ...config import KvCacheConfig, SamplingConfig
from ...errors import CapacityError, UnsupportedError
from ...ops.sample import pack_params, token_counts
from ...types import DTYPES, F32, BatchInput, LogitsTensor, PageMetadata, SequenceInput, Tensor, Traffic
from ..base import (
    DecodeLoop,
    DecodeRow,
    KvCacheHandle,
    ModelWeights,
    PageStage,
    Progress,
    SampleRow,
    WeightsHandle,
    checked,
    page_states,
)
from ..pooling import Pooling, embed, scores
from ..repack import repacked_weights
from .decode import CpuDecodeLoop, Decoders
from .pooling import CpuPooler
from .stage import CpuStage
from .steps import Steps, Workspace


class CpuBackend:
    """Backend over a team of `num_threads` threads (None: every processor this process may use)."""

    name = "cpu"
    maps_weights = True
    weight_dtypes = WEIGHT_DTYPES

    def __init__(self, num_threads: int | None = None, progress: Progress | None = None) -> None:
        self._progress = progress
        self._team = Team(num_threads)
        workspace = Workspace()
        self._steps = Steps(self._team, workspace, self._compiling)
        self._decoders = Decoders(self._team, workspace, self._compiling)
        self._forwards = 0
        self._traffic = Traffic()

    @property
    def numerics(self) -> str:
        return f"cpu {source_key()}"

    @property
    def num_threads(self) -> int:
        return self._team.num_threads

    def _compiling(self, what: str, done: int, total: int) -> None:
        if self._progress:
            self._progress("compile", done, total)

    def upload_weights(
        self, model: ModelWeights, *, dtype: str = "auto", progress: Progress | None = None
    ) -> WeightsHandle:
        tensors = repacked_weights(model, self.weight_dtypes, dtype, self._team.num_threads, progress)
        total = sum(t.nbytes for t in tensors.values())
        with Uploader(self._team.library, self._team.num_threads) as uploader:
            report = (lambda done: progress("load", min(done, total), total)) if progress else (lambda done: None)
            uploader.check_finite(tensors, model.sources, model.path, report)
            tensors = {slot: placed(t, dtype, uploader) for slot, t in tensors.items()}
        return WeightsHandle({**tensors, **model.constants}, model.vocab_size, model.forward, total)

    def alloc_kv_cache(self, config: KvCacheConfig) -> KvCacheHandle:
        if config.nbytes > available_nbytes():
            raise CapacityError(
                f"a KV cache of {config.num_pages * config.page_size} tokens needs {config.nbytes / 2**30:.2f} GiB, "
                f"{available_nbytes() / 2**30:.2f} GiB are free: ask for a smaller context"
            )
        memory = aligned(config.nbytes, 4096)  # zero pages: memory is taken as it is first written
        shape = (
            config.num_pages,
            config.num_layers,
            2,
            config.num_kv_heads,
            config.page_size,
            config.head_dim,
        )
        return KvCacheHandle(config, Tensor(memory.ctypes.data, shape, DTYPES[config.dtype], memory))

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
        handles: list[LogitsTensor | None] = []
        row = 0
        for sequence in batch.sequences:
            if logits is None or not sequence.wants_logits:
                handles.append(None)
                continue
            address = logits.address + row * logits.row_nbytes
            handles.append(LogitsTensor(Tensor(address, logits.shape[1:], F32, logits.owner), self._forwards))
            row += 1
        return handles

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        self._forwards += 1
        self._steps.run(weights, kv, [sequence], "none")

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        self._forwards += 1
        logits = self._steps.run(weights, kv, [sequence], "all").logits
        assert logits is not None
        return logits.to_numpy().copy()

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
        program = Program(self._team)
        tokens = np.zeros(len(rows), np.int32)
        positions = np.array([row.position for row in rows], np.int64)
        for i, row in enumerate(rows):
            if row.logits.generation != self._forwards:
                raise ValueError("these logits were overwritten by a later forward pass: sample before the next one")
            V = row.logits.row.shape[0]
            arrays: dict[str, Tensor | None] = {
                "logits": Tensor(row.logits.row.address, (1, V), F32, row.logits.row.owner),
                "params": Tensor.from_numpy(pack_params([row.sampling])),
                "tokens": Tensor.from_numpy(tokens[i : i + 1]),
                "positions": Tensor.from_numpy(positions[i : i + 1]),
            }
            if row.sampling.has_penalties:
                arrays["counts"] = Tensor.from_numpy(token_counts(row.prompt, row.output, V)[np.newaxis])
            program.add("sample", arrays)
        program.finish(self._compiling)
        program.run()
        return tokens.tolist()

    def start_decode(self, weights: WeightsHandle, kv: KvCacheHandle, rows: Sequence[DecodeRow]) -> DecodeLoop:
        self._forwards += 1  # the loop writes where the logits of forward passes are
        decoder, idle = self._decoders.take(weights, kv, [row.sampling for row in rows])
        return CpuDecodeLoop(decoder, idle, rows)

    def prepare(self, dtypes: Iterable[str]) -> None:
        self._team.library.load(all_entries(dtypes), self._compiling)

    def alloc_swap_space(self, kv: KvCacheHandle, num_slots: int) -> None:
        nbytes = num_slots * kv.config.page_nbytes
        if nbytes > available_nbytes():
            raise CapacityError(
                f"swap space for {num_slots} KV pages needs {nbytes / 2**30:.2f} GiB, "
                f"{available_nbytes() / 2**30:.2f} GiB are free: lower cpu_reserve_mb"
            )
        kv.host_slots = aligned(max(nbytes, 1), 4096)[:nbytes].reshape(num_slots, kv.config.page_nbytes)

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int], slots: Sequence[int]) -> None:
        host, device = _slots(kv), _pages(kv)
        for page, slot in zip(checked(pages, len(device), "page"), checked(slots, len(host), "slot"), strict=True):
            host[slot] = device[page]

    def swap_in_pages(self, kv: KvCacheHandle, slots: Sequence[int], pages: Sequence[int]) -> None:
        host, device = _slots(kv), _pages(kv)
        for page, slot in zip(checked(pages, len(device), "page"), checked(slots, len(host), "slot"), strict=True):
            device[page] = host[slot]

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageMetadata]:
        return page_states(kv)

    def get_memory_pressure(self) -> float:
        return memory_pressure()

    def available_memory(self) -> int:
        return available_nbytes()

    def embedding_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, pooling: Pooling = "last"
    ) -> np.ndarray:
        return embed(self._pooler(weights, kv, batch), batch.sequences, pooling)

    def rerank_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, ids: Sequence[int] | None = None
    ) -> np.ndarray:
        tensors = weights.tensors
        output = tensors.get("lm_head", tensors["embed"])
        return scores(self._pooler(weights, kv, batch), batch.sequences, tensors.get("score"), output, ids)

    def _pooler(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> CpuPooler:
        self._forwards += 1
        return CpuPooler(self._team, self._steps, self._compiling, weights, kv, len(batch.sequences))

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        view, start = _pages(kv), perf_counter()
        out = view[checked(pages, len(view), "page")]
        self._count_pages(out.nbytes, perf_counter() - start, True)
        return out

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        view, start = _pages(kv), perf_counter()
        view[checked(pages, len(view), "page")] = data
        self._count_pages(len(pages) * kv.config.page_nbytes, perf_counter() - start, False)

    def page_stage(self, kv: KvCacheHandle, num_pages: int, num_buffers: int) -> PageStage:
        nbytes = num_pages * num_buffers * kv.config.page_nbytes
        if nbytes > available_nbytes():
            raise CapacityError(
                f"buffers for copies of KV pages need {nbytes / 2**30:.2f} GiB, {available_nbytes() / 2**30:.2f} GiB "
                "are free"
            )
        return CpuStage(kv, num_pages, num_buffers, self._count_pages)

    def _count_pages(self, nbytes: int, seconds: float, is_out: bool) -> None:
        old = self._traffic
        if is_out:
            self._traffic = replace(old, kv_out_bytes=old.kv_out_bytes + nbytes, kv_out_s=old.kv_out_s + seconds)
        else:
            self._traffic = replace(old, kv_in_bytes=old.kv_in_bytes + nbytes, kv_in_s=old.kv_in_s + seconds)

    def traffic(self) -> Traffic:
        return self._traffic

    def close(self) -> None:
        self._steps.clear()
        self._decoders.clear()
        self._team.close()


def _pages(kv: KvCacheHandle) -> np.ndarray:
    """The cache as bytes, u8 [num_pages, page_nbytes]."""
    return kv.tensor.to_numpy().view(np.uint8).reshape(kv.config.num_pages, kv.config.page_nbytes)


def _slots(kv: KvCacheHandle) -> np.ndarray:
    """The host slots, u8 [num_slots, page_nbytes]."""
    if kv.host_slots is None:
        raise UnsupportedError("this KV cache has no swap space: call alloc_swap_space first")
    return kv.host_slots
