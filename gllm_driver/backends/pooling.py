"""One vector for each of several sequences: whole sequences computed in steps of bounded size, their final hidden
states pooled on the device, and scores of the pooled vectors.

What is common to the backends is here; each has a `Pooler` with its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np

from ..errors import RequestError
from ..types import SequenceInput, Tensor

Pooling = Literal["last", "mean", "cls"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "cls")

STEP_TOKENS = 2048  # of one step: enough to fill a device, and activations that fit beside the weights


class Pooler(Protocol):
    """The sums of several sequences' hidden states on a device, f32 [S, D]."""

    def step(self, parts: Sequence[SequenceInput], pieces: np.ndarray) -> None:
        """Compute these parts of sequences and pool their rows; `pieces` i32 [P, 4] as op pool_rows takes them."""

    def sums(self) -> np.ndarray:
        """A copy on the host."""

    def products(self, weight: Tensor) -> np.ndarray:
        """sums times the transposed weight [N, D]: f32 [S, N] on the host."""

    def rows(self, weight: Tensor, ids: Sequence[int]) -> Tensor:
        """Some rows of a matrix in any stored type, as f32 [len(ids), D] on the device."""


def pool(pooler: Pooler, sequences: Sequence[SequenceInput], pooling: Pooling) -> None:
    """Compute the sequences, each whole, and leave what `pooling` says in the pooler's sums (for "mean": the sum)."""
    if pooling not in POOLINGS:
        raise RequestError(f"pooling {pooling!r} is not known: choose {', '.join(POOLINGS)}")
    for step in _steps(sequences):
        pieces: list[tuple[int, int, int, int]] = []
        first = 0
        for index, part in step:
            count, length = len(part.tokens), len(sequences[index].tokens)
            done = part.position - sequences[index].position
            if pooling == "mean":
                pieces.append((index, first, count, int(done == 0)))
            elif pooling == "cls" and done == 0:
                pieces.append((index, first, 1, 1))
            elif pooling == "last" and done + count == length:
                pieces.append((index, first + count - 1, 1, 1))
            first += count
        pooler.step([part for _, part in step], np.array(pieces or [(0, 0, 0, 0)], np.int32))


def _steps(sequences: Sequence[SequenceInput]) -> Iterator[list[tuple[int, SequenceInput]]]:
    """The sequences in parts, as (index, part): each step has at most STEP_TOKENS tokens, one part of a sequence."""
    step: list[tuple[int, SequenceInput]] = []
    room = STEP_TOKENS
    for index, sequence in enumerate(sequences):
        done = 0
        while done < len(sequence.tokens):
            tokens = sequence.tokens[done : done + room]
            part = replace(sequence, tokens=tokens, position=sequence.position + done, wants_logits=False)
            step.append((index, part))
            done, room = done + len(tokens), room - len(tokens)
            if room == 0:
                yield step
                step, room = [], STEP_TOKENS
    if step:
        yield step


def embed(pooler: Pooler, sequences: Sequence[SequenceInput], pooling: Pooling) -> np.ndarray:
    """The pooled vectors, f32 [S, D]."""
    pool(pooler, sequences, pooling)
    found = pooler.sums()
    if pooling == "mean":
        found /= np.array([len(sequence.tokens) for sequence in sequences], np.float32)[:, np.newaxis]
    return found


def scores(
    pooler: Pooler, sequences: Sequence[SequenceInput], head: Tensor | None, output: Tensor, ids: Sequence[int] | None
) -> np.ndarray:
    """What the last hidden states score, f32 [S, N]: by the model's `head` [N, D], or as logits of the tokens `ids`.

    `output` is the matrix that logits are made with. Raises RequestError when a head is wanted and there is none.
    """
    if ids is None and head is None:
        raise RequestError("this model has no head that scores sequences: name the tokens whose logits are the scores")
    pool(pooler, sequences, "last")
    if ids is None:
        assert head is not None
        return pooler.products(head)
    return pooler.products(pooler.rows(output, ids))
