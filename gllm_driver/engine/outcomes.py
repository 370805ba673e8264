"""What the results of a step mean for the sequences they are of: another token, or the end."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BackendError, GllmError
from ..metrics import Recorder
from ..sched.plan import Piece
from ..sched.request import RunningSequence
from .runner import Result


class Outcomes:
    """Tells sequences and the recorder. `ended`: those that are over and still hold pages."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.ended: list[RunningSequence] = []

    def commit(self, piece: Piece, result: Result, now: float, seconds: float) -> None:
        """Make a piece's result part of its sequence."""
        sequence = piece.sequence
        if isinstance(result, GllmError):
            self.end(sequence, "error", result)
            return
        if result is None:
            sequence.progress.prefill_s += seconds
        else:
            self.take(sequence, result, now, seconds)
        # After the token: an interrupt between the two makes the next step compute this piece again, which is harmless.
        sequence.num_computed = piece.start + piece.length

    def take(self, sequence: RunningSequence, token: int, now: float, seconds: float) -> None:
        """A token has been sampled for a sequence: it goes on, or ends."""
        progress, last = sequence.progress, sequence.last_token_at
        if progress.finish_reason is not None:  # its deadline passed during this step
            return
        if last is None:
            progress.prefill_s += seconds
            self._recorder.time_to_first_token.add(now - sequence.submitted_at)
            self._recorder.prompt_tokens += sequence.prompt_length
            self._recorder.cached_tokens += progress.cached_tokens
        else:
            progress.decode_s += seconds
            progress.decode_steps += 1
            self._recorder.inter_token_latency.add(now - last)
        sequence.last_token_at = now
        if token < 0:
            self.end(sequence, "error", _no_number(len(sequence.tokens)))
            return
        request = sequence.request
        if token in request.eos_token_ids:
            self.end(sequence, "stop")
            return
        if request.on_token is not None:
            self._observe(sequence, token, request.on_token)
        sequence.tokens.append(token)
        if sequence.has_enough:
            self.end(sequence, "stop")
        elif len(sequence.tokens) - sequence.prompt_length >= sequence.max_output:
            self.end(sequence, "length")
        if sequence.listener is not None:
            sequence.listener()

    def _observe(self, sequence: RunningSequence, token: int, on_token: Callable[[int], bool]) -> None:
        """Tell the request's observer, once even when an interrupt lets the token come twice."""
        if sequence.num_observed > sequence.num_output:
            return
        try:  # in one line, so that an interrupt hardly ever strikes between the telling and the counting
            sequence.has_enough, sequence.num_observed = on_token(token), sequence.num_observed + 1
        except Exception as error:
            sequence.num_observed += 1  # whoever fails is not told the same again
            if not isinstance(error, GllmError):
                raise
            self.end(sequence, "error", error)

    def end(self, sequence: RunningSequence, reason: str, error: GllmError | None = None) -> None:
        """The request is over. Its reader may know at once; its pages go back before the step ends."""
        if sequence.progress.finish_reason is not None:
            return
        sequence.error = error
        self.ended.append(sequence)
        sequence.progress.finish_reason = reason
        self._recorder.requests[reason] = self._recorder.requests.get(reason, 0) + 1
        self._recorder.output_tokens += sequence.num_output
        if sequence.listener is not None:
            sequence.listener()


def _no_number(position: int) -> BackendError:
    return BackendError(
        f"the logits after {position} tokens hold no number: the weights overflow in this dtype; try --dtype f32"
    )
