"""The CPU backend: the ops of cpu_backend/ behind the Backend protocol. "Device memory" is host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cpu_backend.compile import cache_dir as cache_dir
from cpu_backend.kernels import WEIGHT_DTYPES, all_entries
from cpu_backend.memory import available_nbytes, memory_pressure
from cpu_backend.program import Program
from cpu_backend.team import Team, aligned
from cpu_backend.upload import Uploader, placed

from ..config import KvCacheConfig, SamplingConfig
from ..errors import CapacityError, UnsupportedError
from ..ops.sample import SEEN_IN_PROMPT, pack_params
from ..types import (
    DTYPES,
    F32,
    I32,
    I64,
    BatchInput,
    DType,
    LogitsTensor,
    PageMetadata,
    PageState,
    SequenceInput,
    Tensor,
    Traffic,
)
from .base import DecodeLoop, KvCacheHandle, ModelWeights, Progress, StepTensors, WeightsHandle

MAX_CACHED_PROGRAMS = 64


class Workspace:
    """Named arrays that every step reuses. Growing one moves it: programs recorded before are then stale."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self.generation = 0

    def tensor(self, name: str, shape: tuple[int, ...], dtype: DType) -> Tensor:
        nbytes = int(np.prod(shape)) * dtype.block_nbytes
        if name not in self._arrays or self._arrays[name].nbytes < nbytes:
            if name in self._arrays:
                self.generation += 1
            self._arrays[name] = aligned(max(nbytes, 1))
        array = self._arrays[name]
        return Tensor(array.ctypes.data, shape, dtype, array)


class _Recorder:
    """Records a program over the backend's workspace."""

    def __init__(self, program: Program, workspace: Workspace) -> None:
        self._workspace = workspace
        self.add = program.add

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._workspace.tensor(name, shape, F32)


class CpuBackend:
    """Backend over a team of `num_threads` threads (None: every processor this process may use)."""

    name = "cpu"
    maps_weights = True
    weight_dtypes = WEIGHT_DTYPES

    def __init__(self, num_threads: int | None = None, progress: Progress | None = None) -> None:
        self._progress = progress
        self._team = Team(num_threads)
        self._workspace = Workspace()
        self._programs: OrderedDict[tuple, tuple[int, Program, StepTensors, object]] = OrderedDict()
        self._forwards = 0

    @property
    def num_threads(self) -> int:
        return self._team.num_threads

    def _compiling(self, what: str, done: int, total: int) -> None:
        if self._progress:
            self._progress("compile", done, total)

    def upload_weights(
        self, model: ModelWeights, *, dtype: str = "auto", progress: Progress | None = None
    ) -> WeightsHandle:
        total = sum(t.nbytes for t in model.tensors.values())
        with Uploader(self._team.library, self._team.num_threads) as uploader:
            report = (lambda done: progress("load", min(done, total), total)) if progress else (lambda done: None)
            uploader.check_finite(model.tensors, model.sources, model.path, report)
            tensors = {slot: placed(t, dtype, uploader) for slot, t in model.tensors.items()}
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
        return self.batch_forward_gpu_pure(weights, kv, BatchInput([sequence]))[0]

    def batch_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput
    ) -> list[LogitsTensor]:
        step = self._forward(weights, kv, batch.sequences, "last")
        assert step.logits is not None
        logits, row_nbytes = step.logits, step.logits.row_nbytes
        return [
            LogitsTensor(Tensor(logits.address + i * row_nbytes, logits.shape[1:], F32, logits.owner), self._forwards)
            for i in range(len(batch.sequences))
        ]

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        """Forward pass that only fills the KV cache: a prefill chunk that is not the last."""
        self._forward(weights, kv, [sequence], "none")

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        step = self._forward(weights, kv, [sequence], "all")
        assert step.logits is not None
        return step.logits.to_numpy().copy()

    def _forward(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput], logits: str
    ) -> StepTensors:
        T, S = sum(len(s.tokens) for s in sequences), len(sequences)
        program, step = self._program(weights, kv, T, S, logits, is_decode=S == T)
        _fill(step, sequences)
        self._forwards += 1
        program.run()
        return step

    def _program(
        self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, logits: str, *, is_decode: bool
    ) -> tuple[Program, StepTensors]:
        """The recorded step for this shape; recorded when new, or when the workspace has moved."""
        key = (id(weights), id(kv), T, S, logits, is_decode)
        found = self._programs.get(key)
        if found and found[0] == self._workspace.generation:
            self._programs.move_to_end(key)
            return found[1], found[2]
        while True:
            generation = self._workspace.generation
            program = Program(self._team)
            step = self._step_tensors(weights, kv, T, S, logits, is_decode)
            weights.forward(_Recorder(program, self._workspace), weights.tensors, kv.tensor, step)
            if generation == self._workspace.generation:
                break
        program.finish(self._compiling)
        # the handles are kept with it: their ids must not come to mean other weights
        self._programs[key] = (generation, program, step, (weights, kv))
        self._programs.move_to_end(key)
        if len(self._programs) > MAX_CACHED_PROGRAMS:
            self._programs.popitem(last=False)
        return program, step

    def _step_tensors(
        self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, logits: str, is_decode: bool
    ) -> StepTensors:
        new = self._workspace.tensor
        rows = {"last": S, "all": T, "none": 0}[logits]
        return StepTensors(
            ids=new("ids", (T,), I32),
            positions=new("positions", (T,), I64),
            seq=new("seq", (T,), I32),
            offsets=new("offsets", (S + 1,), I32),
            page_table=new("page_table", (S, kv.config.num_pages), I32),
            logits_rows=new("logits_rows", (S,), I32) if logits == "last" else None,
            logits=new("logits", (rows, weights.vocab_size), F32) if rows else None,
            is_decode=is_decode,
        )

    def sample_from_tensor(
        self, logits: LogitsTensor, config: SamplingConfig, *, position: int, seen: Sequence[int] = ()
    ) -> int:
        if logits.generation != self._forwards:
            raise ValueError("these logits were overwritten by a later forward pass: sample before the next one")
        V = logits.row.shape[0]
        tokens, positions = np.zeros(1, np.int32), np.array([position], np.int64)
        params = pack_params([config])
        arrays: dict[str, Tensor | None] = {
            "logits": Tensor(logits.row.address, (1, V), F32, logits.row.owner),
            "params": Tensor.from_numpy(params),
            "tokens": Tensor.from_numpy(tokens),
            "positions": Tensor.from_numpy(positions),
        }
        if config.has_penalties:
            arrays["counts"] = Tensor.from_numpy(prompt_counts(seen, V))
        program = Program(self._team)
        program.add("sample", arrays)
        program.finish(self._compiling)
        program.run()
        return int(tokens[0])

    def start_decode(
        self,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        sequence: SequenceInput,
        config: SamplingConfig,
        prompt: Sequence[int] = (),
    ) -> DecodeLoop:
        return CpuDecodeLoop(self, weights, kv, sequence, config, prompt)

    def prepare(self, dtypes: Iterable[str]) -> None:
        self._team.library.load(all_entries(dtypes), self._compiling)

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int]) -> None:
        raise UnsupportedError("the CPU backend does not swap KV pages yet")

    def swap_in_pages(self, kv: KvCacheHandle, pages: Sequence[int]) -> None:
        raise UnsupportedError("the CPU backend does not swap KV pages yet")

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageState | PageMetadata]:
        raise UnsupportedError("the CPU backend does not track page states yet")

    def get_memory_pressure(self) -> float:
        return memory_pressure()

    def available_memory(self) -> int:
        return available_nbytes()

    def embedding_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        raise UnsupportedError("the CPU backend does not compute embeddings yet")

    def rerank_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        raise UnsupportedError("the CPU backend does not rerank yet")

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        view = kv.tensor.to_numpy().view(np.uint8).reshape(kv.config.num_pages, kv.config.page_nbytes)
        return view[np.asarray(pages, np.int64)]

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        view = kv.tensor.to_numpy().view(np.uint8).reshape(kv.config.num_pages, kv.config.page_nbytes)
        view[np.asarray(pages, np.int64)] = data

    def traffic(self) -> Traffic:
        return Traffic()

    def close(self) -> None:
        self._programs.clear()
        self._team.close()


class CpuDecodeLoop:
    """The fast path: forward pass and sampling are one program, which also advances ids and positions itself."""

    def __init__(
        self,
        backend: CpuBackend,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        sequence: SequenceInput,
        config: SamplingConfig,
        prompt: Sequence[int],
    ) -> None:
        V = weights.vocab_size
        self._token = np.zeros(1, np.int32)
        self._state: list[np.ndarray] = [
            np.array(sequence.tokens, np.int32),
            np.array([sequence.position], np.int64),
            np.zeros(1, np.int32),
            np.array([0, 1], np.int32),
            np.array([list(sequence.pages)], np.int32),
            pack_params([config]),
        ]
        ids, positions, seq, offsets, page_table, params = (Tensor.from_numpy(a) for a in self._state)
        counts = Tensor.from_numpy(prompt_counts(prompt, V)) if config.has_penalties else None
        generation = -1
        while generation != backend._workspace.generation:
            generation = backend._workspace.generation
            logits = backend._workspace.tensor("logits", (1, V), F32)
            step = StepTensors(ids, positions, seq, offsets, page_table, None, logits, True)
            program = Program(backend._team)
            weights.forward(_Recorder(program, backend._workspace), weights.tensors, kv.tensor, step)
        program.add(
            "sample",
            {
                "logits": logits,
                "params": params,
                "counts": counts,
                "tokens": Tensor.from_numpy(self._token),
                "ids": ids,
                "positions": positions,
            },
        )
        self._program = program.finish(backend._compiling)

    def step(self) -> int:
        self._program.run()
        return int(self._token[0])


def prompt_counts(prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    """The `counts` row of op sample for a prompt: i32 [1, vocab]."""
    counts = np.zeros((1, vocab_size), np.int32)
    counts[0, np.asarray(prompt, np.int64)] = SEEN_IN_PROMPT
    return counts


def _fill(step: StepTensors, sequences: Sequence[SequenceInput]) -> None:
    """Write the step's inputs into their arrays."""
    ids, positions, seq = step.ids.to_numpy(), step.positions.to_numpy(), step.seq.to_numpy()
    offsets, page_table = step.offsets.to_numpy(), step.page_table.to_numpy()
    start = 0
    for i, sequence in enumerate(sequences):
        stop = start + len(sequence.tokens)
        ids[start:stop] = sequence.tokens
        positions[start:stop] = np.arange(sequence.position, sequence.position + stop - start)
        seq[start:stop] = i
        offsets[i] = start
        page_table[i, : len(sequence.pages)] = sequence.pages
        start = stop
    offsets[len(sequences)] = start
    if step.logits_rows is not None:
        step.logits_rows.to_numpy()[:] = offsets[1:] - 1
