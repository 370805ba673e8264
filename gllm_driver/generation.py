"""What a generation gives back: pieces of text as they come, and the whole with its figures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypedDict

from .engine import Progress, RequestHandle
from .types import Traffic

if TYPE_CHECKING:
    from .engine.async_engine import AsyncHandle


class GenerationOptions(TypedDict, total=False):
    """What may be said about a generation; `LLM.stream` explains it."""

    max_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: Sequence[str]
    ignore_eos: bool
    priority: int
    flow: str
    deadline_s: float | None


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds; rates in tokens per second (0 where nothing was measured).

    prefill_s and decode_s are the steps that this request took part in; others may have shared them.
    """

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class GenerationResult:
    """What was generated. `tokens` and `text` are without the prompt and without the token that ended it.

    finish_reason: "stop" (end token or stop string), "length" (max_tokens or context), "deadline", "interrupted"
    (stopped early). A stop string is cut from `text`, but the tokens it came in stay in `tokens`. cached_tokens: of the
    prompt, whose KV was there already.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    timings: Timings
    traffic: Traffic
    device: str
    cached_tokens: int = 0


class Decoder(Protocol):
    """Tokens to text (gllm_driver.text.StreamDecoder)."""

    stopped_by: str | None

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


class Text:
    """The text of a request as the stepping thread makes it: one piece per token, then the rest."""

    def __init__(self, decoder: Decoder | None) -> None:
        self._decoder = decoder
        self._pieces: list[str] = []
        self._num_shown = 0

    def push(self, token: int) -> bool:
        """A token has come; True when a stop string is complete."""
        if self._decoder is None:
            return False
        self._pieces.append(self._decoder.push(token))
        return self._decoder.stopped_by is not None

    def show(self, num_tokens: int) -> str:
        """The text of the first `num_tokens` tokens that has not been shown yet."""
        pieces = self._pieces[self._num_shown : num_tokens]
        self._num_shown += len(pieces)
        return pieces[0] if len(pieces) == 1 else "".join(pieces)

    def finish(self) -> str:
        """The rest, once no token is to come."""
        rest = self.show(len(self._pieces))
        return rest + self._decoder.finish() if self._decoder is not None else rest


@dataclass(frozen=True)
class Circumstances:
    """What a result says that is not the request's own."""

    device: str
    load_s: float
    prompt_tokens: int
    traffic: Callable[[], Traffic]


class _Stream:
    """What both kinds of stream have."""

    def __init__(self, handle: RequestHandle | AsyncHandle, text: Text, circumstances: Circumstances) -> None:
        self._handle = handle
        self._text = text
        self._circumstances = circumstances
        self._traffic = circumstances.traffic()
        self._shown: list[str] = []
        self._is_read = False

    def _show(self, piece: str) -> str:
        self._shown.append(piece)
        return piece

    def _rest(self) -> str:
        """What is left to show when the tokens have ended; only the first time."""
        if self._is_read:
            return ""
        self._is_read = True
        return self._text.finish()

    def close(self) -> None:
        """Stop generating; `result` then says "interrupted" unless the generation had ended by itself."""
        self._is_read = True
        self._handle.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._handle.cancel()

    @property
    def result(self) -> GenerationResult:
        """The generation as far as it has been read."""
        handle, about = self._handle, self._circumstances
        progress: Progress = handle.progress
        tokens = handle.tokens
        reason = progress.finish_reason if handle.num_read == len(tokens) else None
        computed = about.prompt_tokens - progress.cached_tokens
        return GenerationResult(
            text="".join(self._shown),
            tokens=tokens[: handle.num_read],
            prompt_tokens=about.prompt_tokens,
            finish_reason="interrupted" if reason in (None, "cancelled", "error") else reason,
            timings=Timings(
                load_s=about.load_s,
                prefill_s=progress.prefill_s,
                decode_s=progress.decode_s,
                prefill_tokens_per_s=computed / progress.prefill_s if progress.prefill_s else 0.0,
                decode_tokens_per_s=progress.decode_steps / progress.decode_s if progress.decode_s else 0.0,
            ),
            traffic=about.traffic() - self._traffic,
            device=about.device,
            cached_tokens=progress.cached_tokens,
        )


class TextStream(_Stream):
    """Iterator over pieces of text; `result` is what has been read so far. Closing it stops the generation.

    Streams that are open at the same time share the model's steps, whichever of them is being read.
    """

    _handle: RequestHandle

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        handle, text = self._handle, self._text
        while not self._is_read:
            if next(handle, None) is None:
                rest = self._rest()
                if rest:
                    return self._show(rest)
                break
            piece = text.show(handle.num_read)
            if piece:
                return self._show(piece)
        raise StopIteration

    def read_all(self) -> GenerationResult:
        """Read to the end. Raises what ended the generation, if that was an error."""
        for _ in self:
            pass
        return self.result

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTextStream(_Stream):
    """Asynchronous iterator over pieces of text; otherwise a `TextStream`."""

    _handle: AsyncHandle

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        handle, text = self._handle, self._text
        while not self._is_read:
            if await anext(handle, None) is None:
                rest = self._rest()
                if rest:
                    return self._show(rest)
                break
            piece = text.show(handle.num_read)
            if piece:
                return self._show(piece)
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
