"""Steps of any shape: recorded once per shape over a workspace they share, replayed with new inputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpu_backend.program import Program
from cpu_backend.team import Team, aligned

from ...types import F32, I32, I64, DType, SequenceInput, Tensor
from ..base import KvCacheHandle, StepTensors, WeightsHandle

MAX_CACHED_STEPS = 64

Compiling = Callable[[str, int, int], None]


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


class Recorder:
    """Records a program over a workspace."""

    def __init__(self, program: Program, workspace: Workspace) -> None:
        self._workspace = workspace
        self._program = program

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        self._program.add(op, arrays, scalars)

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._workspace.tensor(name, shape, F32)


@dataclass(frozen=True)
class Step:
    """A recorded step and its inputs. The handles are kept with it: their ids must not come to mean others."""

    generation: int
    program: Program
    tensors: StepTensors
    handles: tuple[WeightsHandle, KvCacheHandle]


class Steps:
    """The recorded steps, the least recently used of them dropped when there are too many."""

    def __init__(self, team: Team, workspace: Workspace, compiling: Compiling) -> None:
        self._team = team
        self._workspace = workspace
        self._compiling = compiling
        self._cached: OrderedDict[tuple, Step] = OrderedDict()

    def run(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput], logits: str
    ) -> StepTensors:
        """Run the forward pass over `sequences`; `logits`: of the "last" token where wanted, of "all", of "none", or
        "hidden": the final hidden states instead.
        """
        T, S = sum(len(s.tokens) for s in sequences), len(sequences)
        R = {"last": sum(s.wants_logits for s in sequences), "all": T, "none": 0, "hidden": 0}[logits]
        step = self._step(weights, kv, T, S, R if logits == "last" else -R, logits == "hidden")
        _fill(step.tensors, sequences)
        step.program.run()
        return step.tensors

    def _step(self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, rows: int, hidden: bool) -> Step:
        """The recorded step for this shape (`rows` < 0: logits of every token); anew when the workspace has moved."""
        key = (id(weights), id(kv), T, S, rows, hidden)
        found = self._cached.get(key)
        if found is None or found.generation != self._workspace.generation:
            found = self._cached[key] = self._record(weights, kv, T, S, rows, hidden)
        self._cached.move_to_end(key)
        if len(self._cached) > MAX_CACHED_STEPS:
            self._cached.popitem(last=False)
        return found

    def _record(self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, rows: int, hidden: bool) -> Step:
        new, generation = self._workspace.tensor, -1
        while generation != self._workspace.generation:
            generation = self._workspace.generation
            tensors = StepTensors(
                ids=new("ids", (T,), I32),
                positions=new("positions", (T,), I64),
                seq=new("seq", (T,), I32),
                offsets=new("offsets", (S + 1,), I32),
                page_table=new("page_table", (S, kv.config.num_pages), I32),
                logits_rows=new("logits_rows", (rows,), I32) if rows > 0 else None,
                logits=new("logits", (abs(rows), weights.vocab_size), F32) if rows else None,
                is_decode=S == T,
                hidden=new("hidden", (T, weights.tensors["final_norm"].shape[-1]), F32) if hidden else None,
            )
            program = Program(self._team)
            weights.forward(Recorder(program, self._workspace), weights.tensors, kv.tensor, tensors)
        return Step(generation, program.finish(self._compiling), tensors, (weights, kv))

    def clear(self) -> None:
        self._cached.clear()


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
        step.logits_rows.to_numpy()[:] = [offsets[i + 1] - 1 for i, s in enumerate(sequences) if s.wants_logits]
