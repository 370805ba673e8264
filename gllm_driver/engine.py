"""The generation loop: pages → prefill in chunks → sample → decode, one token id per step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .backends.base import Backend, DecodeRow, KvCacheHandle, WeightsHandle
from .config import KvCacheConfig, SamplingConfig
from .errors import BackendError, CapacityError, RequestError
from .kv.pages import PagePool
from .types import SequenceInput

PREFILL_CHUNK = 256  # tokens of one prefill step: long enough to reuse weights, short enough to stop quickly


@dataclass(frozen=True)
class Request:
    """What to generate: prompt ids, how to sample, when to stop."""

    tokens: Sequence[int]
    sampling: SamplingConfig
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()  # empty: never stop at a token


@dataclass
class Progress:
    """What a running generation has measured so far (seconds), and why it ended."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    finish_reason: str | None = None
    tokens: list[int] = field(default_factory=list)


class Engine:
    """One model on one backend, with a KV cache of `context_length` tokens. One generation at a time."""

    def __init__(self, backend: Backend, weights: WeightsHandle, kv: KvCacheConfig, context_length: int) -> None:
        self.backend = backend
        self.weights = weights
        self.context_length = context_length
        self.kv: KvCacheHandle = backend.alloc_kv_cache(kv)
        self.pool = PagePool(kv.num_pages, kv.page_size)

    def check(self, request: Request) -> None:
        """Raise RequestError or CapacityError if the request cannot be run. Nothing is reserved."""
        _check_tokens(request.tokens, self.weights.vocab_size)
        if request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}")
        if len(request.tokens) >= self.context_length:
            raise CapacityError(
                f"the prompt has {len(request.tokens)} tokens and leaves no room in a context of "
                f"{self.context_length}: shorten it or load the model with a larger context"
            )

    def generate(self, request: Request, progress: Progress) -> Iterator[int]:
        """Token ids as they are chosen; an end token is not among them. `progress` is kept up to date.

        Stops at max_tokens, an end token or the end of the context. Pages are given back however it ends.
        """
        self.check(request)
        prompt = list(request.tokens)
        limit = min(request.max_tokens, self.context_length - len(prompt))
        pages = self.pool.allocate(len(prompt) + limit)
        try:
            yield from self._run(request, prompt, pages, limit, progress)
        finally:
            self.pool.release(pages)

    def _run(
        self, request: Request, prompt: list[int], pages: list[int], limit: int, progress: Progress
    ) -> Iterator[int]:
        start = time.perf_counter()
        token = self._prefill(request, prompt, pages)
        progress.prefill_s = time.perf_counter() - start
        loop = None
        while True:
            if token < 0:
                raise BackendError(
                    f"the logits after {len(prompt) + len(progress.tokens)} tokens hold no number: the weights "
                    "overflow in this dtype; try --dtype f32"
                )
            if token in request.eos_token_ids:
                progress.finish_reason = "stop"
                return
            progress.tokens.append(token)
            last = len(progress.tokens) == limit
            if last:
                progress.finish_reason = "length"
            yield token
            if last:
                return
            start = time.perf_counter()
            if loop is None:
                row = DecodeRow(token, len(prompt), pages, request.sampling, prompt, progress.tokens)
                loop = self.backend.start_decode(self.weights, self.kv, [row])
            token = loop.step()[0]
            progress.decode_s += time.perf_counter() - start
            progress.decode_steps += 1

    def _prefill(self, request: Request, prompt: list[int], pages: list[int]) -> int:
        """Run the prompt through the model in chunks and choose the first token."""
        backend, position = self.backend, 0
        while len(prompt) - position > PREFILL_CHUNK:
            chunk = SequenceInput(prompt[position : position + PREFILL_CHUNK], position, pages)
            backend.extend(self.weights, self.kv, chunk)
            position += PREFILL_CHUNK
        logits = backend.generator_forward_gpu_pure(
            self.weights, self.kv, SequenceInput(prompt[position:], position, pages)
        )
        return backend.sample_from_tensor(logits, request.sampling, position=len(prompt) - 1, prompt=prompt)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of a sequence: f32 [T, vocab]."""
        _check_tokens(tokens, self.weights.vocab_size)
        if len(tokens) > self.context_length:
            raise CapacityError(f"{len(tokens)} tokens do not fit in a context of {self.context_length}")
        pages = self.pool.allocate(len(tokens))
        try:
            parts = [
                self.backend.logits_forward(
                    self.weights, self.kv, SequenceInput(tokens[start : start + PREFILL_CHUNK], start, pages)
                )
                for start in range(0, len(tokens), PREFILL_CHUNK)
            ]
        finally:
            self.pool.release(pages)
        return np.concatenate(parts)


def _check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    if not len(tokens):
        raise RequestError("the prompt is empty: give at least one token")
    for i, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise RequestError(f"token {i} of the prompt is {token}, outside the vocabulary of {vocab_size}")
