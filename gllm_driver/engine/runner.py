"""Runs the plan of a step on a backend; what fails together is tried again one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..backends.base import Backend, DecodeLoop, DecodeRow, KvCacheHandle, SampleRow, WeightsHandle
from ..errors import ContextLost, GllmError, UnsupportedError
from ..sched.plan import Piece, StepPlan
from ..types import BatchInput, SequenceInput

Result = int | GllmError | None
"""Of one piece: the token sampled after it, the error that ends its request, or None where no token was wanted."""


class Runner:
    """Keeps one decode loop for as long as the same sequences decode and nobody else computes anything."""

    def __init__(
        self,
        backend: Backend,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        pages_of: Callable[[int], Sequence[int]],
    ) -> None:
        self._backend = backend
        self._weights = weights
        self._kv = kv
        self._pages_of = pages_of
        self._members: tuple[int, ...] = ()
        self._pages: list[list[int]] = []
        self.max_loop_rows: int | None = None  # where the backend turned out to have a limit
        self.loop: DecodeLoop | None = None

    def run(self, plan: StepPlan) -> list[Result]:
        """Compute every piece; one result each. Raises nothing of GllmError's kind: those are results."""
        pieces = plan.pieces
        try:
            if plan.is_pure_decode and (self.max_loop_rows is None or len(pieces) <= self.max_loop_rows):
                return list(self._decode(pieces))
            self.close()
            return self._forward(pieces)
        except GllmError as error:
            self.close()
            if isinstance(error, UnsupportedError) and self.max_loop_rows is None and len(pieces) > 1:
                self.max_loop_rows = 1  # this backend's loops do not take several: step by step, then
                return self.run(plan)
            return self.one_by_one(pieces, error)

    def one_by_one(self, pieces: Sequence[Piece], error: GllmError) -> list[Result]:
        """What each piece gives alone, after they failed together with `error`. Computing a piece twice is harmless."""
        if len(pieces) == 1 or isinstance(error, ContextLost):
            return [error] * len(pieces)
        return [self._alone(piece) for piece in pieces]

    def _alone(self, piece: Piece) -> Result:
        try:
            return self._forward([piece])[0]
        except GllmError as error:
            return error

    def _decode(self, pieces: Sequence[Piece]) -> list[int]:
        """One step of the loop of these sequences."""
        members = tuple(piece.sequence.id for piece in pieces)
        pages = [list(self._pages_of(member)) for member in members]
        if not (members == self._members and self._set_pages(pages)):
            self.close()
            rows = [
                DecodeRow(sequence.tokens[-1], start, own, sequence.request.sampling, *_seen(piece))
                for piece, own in zip(pieces, pages, strict=True)
                for sequence, start in ((piece.sequence, piece.start),)
            ]
            self.loop = self._backend.start_decode(self._weights, self._kv, rows)
        self._members, self._pages = members, pages
        assert self.loop is not None
        return self.loop.step()

    def _set_pages(self, pages: Sequence[list[int]]) -> bool:
        """Tell the loop which rows have more pages. False: there is no loop, or it must begin anew to know them."""
        if self.loop is None or any(new[: len(old)] != old for new, old in zip(pages, self._pages, strict=True)):
            return False
        try:
            for row, (new, old) in enumerate(zip(pages, self._pages, strict=True)):
                if len(new) != len(old):
                    self.loop.set_pages(row, new)
        except UnsupportedError:
            return False
        return True

    def _forward(self, pieces: Sequence[Piece]) -> list[Result]:
        """One forward pass, and one choice of tokens for those that want one."""
        batch = BatchInput(
            [
                SequenceInput(
                    piece.sequence.tokens[piece.start : piece.start + piece.length],
                    piece.start,
                    self._pages_of(piece.sequence.id),
                    piece.wants_logits,
                )
                for piece in pieces
            ]
        )
        logits = self._backend.batch_forward_gpu_pure(self._weights, self._kv, batch)
        rows = [
            SampleRow(own, piece.sequence.request.sampling, piece.start + piece.length - 1, *_seen(piece))
            for piece, own in zip(pieces, logits, strict=True)
            if own is not None
        ]
        ids = iter(self._backend.sample_rows(rows) if rows else ())
        return [None if own is None else next(ids) for own in logits]

    def close(self) -> None:
        """End the decode loop, if there is one."""
        loop, self.loop = self.loop, None
        self._members, self._pages = (), []
        if loop is not None:
            loop.close()


def _seen(piece: Piece) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and output, for penalties alone."""
    sequence = piece.sequence
    if not sequence.request.sampling.has_penalties:
        return (), ()
    return sequence.tokens[: sequence.prompt_length], sequence.output
