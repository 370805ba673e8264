"""Steps of any shape: recorded once per shape, their inputs brought up in one copy."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ...types import F32, I32, I64, SequenceInput
from ..base import KvCacheHandle, StepTensors, WeightsHandle
from .memory import Mirror
from .program import Program
from .runtime import Runtime

MAX_CACHED_STEPS = 64


@dataclass
class Step:
    """A recorded step with its inputs' place on the device."""

    program: Program
    inputs: Mirror
    tensors: StepTensors
    generation: int
    runs: int = 0

    def close(self) -> None:
        self.program.close()
        self.inputs.close()


class Steps:
    """The recorded steps, the least recently used of them dropped when there are too many."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._cached: OrderedDict[tuple, Step] = OrderedDict()

    def run(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput], logits: str
    ) -> StepTensors:
        """Queue the forward pass over `sequences`; `logits`: of the "last" token of each, "all", or "none"."""
        runtime = self._runtime
        T, S = sum(len(s.tokens) for s in sequences), len(sequences)
        width = table_width(max(len(s.pages) for s in sequences), kv.config.num_pages)
        step = self._step(weights, kv, T, S, width, logits)
        with runtime.device:
            _fill(step.inputs, sequences)
            step.inputs.upload(runtime.stream)
            # A prompt of one token is a decode step that may never come again: the second time is worth a graph.
            if step.tensors.is_decode and runtime.use_graphs and step.runs and not step.program.is_captured:
                step.program.capture()
            if step.program.is_captured:
                step.program.replay()
            else:
                step.program.issue()
        step.runs += 1
        return step.tensors

    def _step(self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, width: int, logits: str) -> Step:
        """The recorded step for this shape; recorded when new, or when the workspace has moved."""
        key = (id(weights), id(kv), T, S, width, logits)
        workspace = self._runtime.workspace
        step = self._cached.pop(key, None)
        if step is not None and step.generation != workspace.generation:
            step.close()
            step = None
        if step is None:
            step = self._record(weights, kv, T, S, width, logits)
            if len(self._cached) == MAX_CACHED_STEPS:
                self._cached.popitem(last=False)[1].close()
        self._cached[key] = step
        return step

    def _record(self, weights: WeightsHandle, kv: KvCacheHandle, T: int, S: int, width: int, logits: str) -> Step:
        workspace = self._runtime.workspace
        rows = {"last": S, "all": T, "none": 0}[logits]
        inputs = Mirror(
            self._runtime.device,
            [
                ("ids", (T,), I32),
                ("positions", (T,), I64),
                ("seq", (T,), I32),
                ("offsets", (S + 1,), I32),
                ("page_table", (S, width), I32),
                ("logits_rows", (S,), I32),
            ],
        )
        try:
            generation = -1
            while generation != workspace.generation:
                generation = workspace.generation
                tensors = StepTensors(
                    ids=inputs.tensor("ids"),
                    positions=inputs.tensor("positions"),
                    seq=inputs.tensor("seq"),
                    offsets=inputs.tensor("offsets"),
                    page_table=inputs.tensor("page_table"),
                    logits_rows=inputs.tensor("logits_rows") if logits == "last" else None,
                    logits=workspace.tensor("logits", (rows, weights.vocab_size), F32) if rows else None,
                    is_decode=S == T,
                )
                program = self._runtime.program()
                weights.forward(program, weights.tensors, kv.tensor, tensors)
                program.finish()
        except BaseException:
            inputs.close()
            raise
        return Step(program, inputs, tensors, generation)

    def forget(self, handle: int) -> None:
        """Close the steps of weights or a cache (its id) that are gone."""
        for key in [k for k in self._cached if handle in k[:2]]:
            self._cached.pop(key).close()


def table_width(num_pages: int, limit: int) -> int:
    """A page-table width that many sequences share, so that they share programs: a power of two, or `limit`."""
    return min(1 << max(num_pages - 1, 0).bit_length(), max(limit, num_pages))


def _fill(inputs: Mirror, sequences: Sequence[SequenceInput]) -> None:
    """Write the step's inputs into their image. Unused entries of the page table are page 0, which always exists."""
    host = inputs.host()
    ids, positions, seq, offsets = host["ids"], host["positions"], host["seq"], host["offsets"]
    host["page_table"][:] = 0
    start = 0
    for i, sequence in enumerate(sequences):
        stop = start + len(sequence.tokens)
        ids[start:stop] = sequence.tokens
        positions[start:stop] = range(sequence.position, sequence.position + stop - start)
        seq[start:stop] = i
        offsets[i] = start
        host["page_table"][i, : len(sequence.pages)] = sequence.pages
        start = stop
    offsets[len(sequences)] = start
    host["logits_rows"][:] = offsets[1:] - 1
