"""Steps of any shape: recorded once per shape, their inputs brought up in one copy.

Shapes are rounded up (shapes.py). What pads them touches no sequence: a padding token of a mixed step comes after the
tokens of all sequences, and its K and V go to the cache's spare page; a padding sequence of a mixed step has no tokens;
a padding row of a decode step is a sequence of its own, all of whose pages are the spare page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from ...types import F32, I32, I64, SequenceInput, Tensor
from ..base import KvCacheHandle, StepTensors, WeightsHandle
from .memory import Mirror
from .program import Program
from .runtime import Runtime
from .shapes import bucket, table_width

MAX_CACHED_STEPS = 128
RUNS_BEFORE_GRAPH = 2  # a shape that came so often is worth a graph
DECODE_RUNS_BEFORE_GRAPH = 1


@dataclass(frozen=True)
class Shape:
    """What a recorded step is made for: T tokens of S sequences, page tables of a width, logits of `rows` tokens."""

    T: int
    S: int
    width: int
    rows: int
    is_decode: bool
    all_logits: bool = False  # of every token, in order
    hidden: bool = False  # the final hidden states of every token instead


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
        self._cached: OrderedDict[tuple[int, int, Shape], Step] = OrderedDict()
        runtime.recorded.append(self._cached)

    def run(self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput]) -> Tensor | None:
        """Queue the forward pass; row i of the result is for the i-th of the sequences that want logits."""
        return self._run(weights, kv, sequences, self._shape(kv, sequences))

    def run_all(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> Tensor:
        """Queue the forward pass over one sequence: logits of every token, f32 [T, vocab]."""
        T = len(sequence.tokens)
        width = table_width(len(sequence.pages), kv.config.num_pages)
        logits = self._run(weights, kv, [sequence], Shape(T, 1, width, T, T == 1, all_logits=True))
        assert logits is not None
        return logits

    def run_hidden(self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput]) -> Tensor:
        """Queue the forward pass over sequences: final hidden states, f32 [≥ T, D], tokens in order."""
        hidden = self._run(weights, kv, sequences, replace(self._shape(kv, sequences), hidden=True))
        assert hidden is not None
        return hidden

    def _shape(self, kv: KvCacheHandle, sequences: Sequence[SequenceInput]) -> Shape:
        lengths = [len(s.tokens) for s in sequences]
        if min(lengths) < 1:
            raise ValueError("every sequence of a step has at least one new token")
        T, S = sum(lengths), len(lengths)
        wanted = sum(s.wants_logits for s in sequences)
        num_pages = max(len(s.pages) for s in sequences)
        if T == S:
            width = table_width(num_pages, kv.config.num_pages)
            return Shape(bucket(S), bucket(S), width, bucket(wanted), is_decode=True)
        if bucket(T) > T:  # the padding needs an entry of some row's page table
            num_pages = max(num_pages, min(len(s.pages) for s in sequences) + 1)
        width = table_width(num_pages, kv.config.num_pages)
        return Shape(bucket(T), bucket(S), width, bucket(wanted), is_decode=False)

    def _run(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequences: Sequence[SequenceInput], shape: Shape
    ) -> Tensor | None:
        runtime, step = self._runtime, self._step(weights, kv, shape)
        with runtime.device:
            _fill(step.inputs.host(), shape, sequences, kv)
            step.inputs.upload(runtime.stream)
            program = step.program
            worth_it = DECODE_RUNS_BEFORE_GRAPH if shape.is_decode else RUNS_BEFORE_GRAPH
            if runtime.use_graphs and step.runs >= worth_it and not program.is_captured:
                program.capture()
            if program.is_captured:
                program.replay()
            else:
                program.issue()
        step.runs += 1
        return step.tensors.hidden if shape.hidden else step.tensors.logits

    def _step(self, weights: WeightsHandle, kv: KvCacheHandle, shape: Shape) -> Step:
        """The recorded step for this shape."""
        key = (id(weights), id(kv), shape)
        step = self._cached.pop(key, None)
        if step is None:
            step = self._record(weights, kv, shape)
            if len(self._cached) == MAX_CACHED_STEPS:
                self._cached.popitem(last=False)[1].close()
        self._cached[key] = step
        return step

    def _record(self, weights: WeightsHandle, kv: KvCacheHandle, shape: Shape) -> Step:
        workspace, T, S = self._runtime.workspace, shape.T, shape.S
        hidden_size = weights.tensors["final_norm"].shape[-1]
        inputs = Mirror(
            self._runtime.device,
            [
                ("ids", (T,), I32),
                ("positions", (T,), I64),
                ("seq", (T,), I32),
                ("offsets", (S + 1,), I32),
                ("page_table", (S, shape.width), I32),
                ("logits_rows", (max(shape.rows, 1),), I32),
            ],
        )
        try:
            generation = -1
            while generation != workspace.generation:
                generation = workspace.generation
                by_row = shape.rows and not shape.all_logits
                tensors = StepTensors(
                    ids=inputs.tensor("ids"),
                    positions=inputs.tensor("positions"),
                    seq=inputs.tensor("seq"),
                    offsets=inputs.tensor("offsets"),
                    page_table=inputs.tensor("page_table"),
                    logits_rows=inputs.tensor("logits_rows") if by_row else None,
                    logits=workspace.tensor("logits", (shape.rows, weights.vocab_size), F32) if shape.rows else None,
                    is_decode=shape.is_decode,
                    hidden=workspace.tensor("hidden", (T, hidden_size), F32) if shape.hidden else None,
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


def _fill(host: dict[str, np.ndarray], shape: Shape, sequences: Sequence[SequenceInput], kv: KvCacheHandle) -> None:
    """Write the step's inputs into their image. Unused entries of page tables are the spare page."""
    S, spare = len(sequences), kv.config.num_pages
    lengths = np.fromiter((len(s.tokens) for s in sequences), np.int32, S)
    offsets, page_table = host["offsets"], host["page_table"]
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1 : S + 1])
    T = int(offsets[S])
    host["ids"][:T] = np.fromiter(chain.from_iterable(s.tokens for s in sequences), np.int32, T)
    first = np.fromiter((s.position for s in sequences), np.int64, S) - offsets[:S]
    host["positions"][:T] = np.arange(T) + np.repeat(first, lengths)
    host["seq"][:T] = np.repeat(np.arange(S, dtype=np.int32), lengths)
    page_table[:] = spare
    for row, sequence in zip(page_table, sequences, strict=False):
        row[: len(sequence.pages)] = sequence.pages
    rows = host["logits_rows"]
    wanted = offsets[1 : S + 1][[s.wants_logits for s in sequences]] - 1
    rows[: len(wanted)] = wanted
    rows[len(wanted) :] = 0
    if shape.is_decode:
        host["ids"][T:] = 0
        host["positions"][T:] = 0
        host["seq"][T:] = np.arange(S, shape.S)
        offsets[S + 1 :] = np.arange(S + 1, shape.S + 1)
        return
    offsets[S + 1 :] = T
    if shape.T > T:
        shortest = min(range(S), key=lambda s: len(sequences[s].pages))
        host["ids"][T:] = 0
        host["seq"][T:] = shortest
        host["positions"][T:] = len(sequences[shortest].pages) * kv.config.page_size  # its first unused entry
