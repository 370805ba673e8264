"""What the submitter of a request holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..sched.request import Progress, RunningSequence

if TYPE_CHECKING:
    from .engine import Engine


class RequestHandle:
    """Iterator over the token ids of a request, as they come; an end token is not among them.

    Whoever waits for a token works for it: it runs the engine's steps unless another thread is doing so, and each step
    serves every request. So nothing happens for a request while nobody waits for any (see Engine.step, AsyncEngine).

    Iterating raises what ended the request, if that was an error. A handle has one reader; requests may have as many
    threads as there are handles. Deadline and cancellation are ends without an error: see `finish_reason`.
    """

    def __init__(self, engine: Engine, sequence: RunningSequence) -> None:
        self._engine = engine
        self._sequence = sequence
        self._num_read = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        sequence = self._sequence
        at = sequence.prompt_length + self._num_read
        if at >= len(sequence.tokens):
            self._engine.advance(sequence, at)
            if at >= len(sequence.tokens):
                if sequence.error is not None:
                    raise sequence.error
                raise StopIteration
        self._num_read += 1
        return sequence.tokens[at]

    def result(self) -> list[int]:
        """All token ids of the output, once the request has ended. Raises what ended it, if that was an error."""
        while self._sequence.progress.finish_reason is None:
            self._engine.advance(self._sequence, len(self._sequence.tokens))
        if self._sequence.error is not None:
            raise self._sequence.error
        return self._sequence.output

    def cancel(self) -> None:
        """End the request; tokens it has stay readable. After its end this does nothing. Any thread may call it."""
        self._engine.cancel(self._sequence)

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this whenever tokens have come, or the end: from the stepping thread, which it must not hold up."""
        self._sequence.listener = listener

    @property
    def ready(self) -> bool:
        """Reading on would not wait: there is a token, or the end."""
        sequence = self._sequence
        return sequence.prompt_length + self._num_read < len(sequence.tokens) or self.done

    @property
    def done(self) -> bool:
        """It has ended; tokens may still be unread."""
        return self._sequence.progress.finish_reason is not None

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "cancelled", "deadline", "error"; None while it goes on."""
        return self._sequence.progress.finish_reason

    @property
    def num_read(self) -> int:
        """How many tokens have been read from this iterator."""
        return self._num_read

    @property
    def tokens(self) -> list[int]:
        """Token ids so far, read or not."""
        return self._sequence.output

    @property
    def progress(self) -> Progress:
        """What has been measured so far."""
        return self._sequence.progress
