"""What a caller asks for, as a request to the engine, and where its text will be."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .config import SamplingConfig
from .engine import Engine, Request
from .errors import GllmError, RequestError
from .generation import Text

if TYPE_CHECKING:
    from .loaders.tokenizer import Tokenizer
    from .models.checkpoint import GenerationDefaults


class Prompts:
    """Makes requests of prompts and options, as a model's files recommend where nothing is said."""

    def __init__(self, engine: Engine, defaults: GenerationDefaults, tokenizer: Callable[[], Tokenizer]) -> None:
        """`tokenizer` is asked when it is first needed."""
        self._engine = engine
        self._defaults = defaults
        self._load_tokenizer = tokenizer

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        priority: int = 0,
        flow: str = "",
        deadline_s: float | None = None,
    ) -> tuple[Request, Text]:
        """A request, and where its text will be."""
        if isinstance(stop, str):
            stop = (stop,)
        if any(not s for s in stop):
            raise RequestError("a stop string must not be empty")
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: give at least one character")
            tokens: Sequence[int] = self._tokenizer.encode(prompt)
        else:
            tokens = [int(t) for t in prompt]
        defaults = self._defaults
        shapes_draws = bool(top_k) or bool(min_p) or (top_p is not None and top_p < 1)

        def choose(name: str, given: Any, neutral: Any) -> Any:
            recommended = getattr(defaults, name, None)
            return given if given is not None else neutral if recommended is None else recommended

        sampling = SamplingConfig(
            temperature=temperature if temperature is not None else defaults.temperature or float(shapes_draws),
            top_k=choose("top_k", top_k, 0),
            top_p=choose("top_p", top_p, 1.0),
            min_p=choose("min_p", min_p, 0.0),
            repetition_penalty=choose("repetition_penalty", repetition_penalty, 1.0),
            presence_penalty=presence_penalty or 0.0,
            frequency_penalty=frequency_penalty or 0.0,
            seed=secrets.randbits(64) if seed is None else seed,
        )
        self._engine.check_tokens(tokens)
        text = Text(self._stream_decoder(stop, tokens))
        request = Request(
            tokens,
            sampling,
            max_tokens,
            frozenset() if ignore_eos else self._eos_token_ids,
            priority,
            flow,
            deadline_s,
            text.push,
        )
        return request, text

    @cached_property
    def _eos_token_ids(self) -> frozenset[int]:
        ids = set(self._defaults.eos_token_ids)
        if self._has_text:
            ids |= self._tokenizer.eos_token_ids
        return frozenset(ids)

    @cached_property
    def _has_text(self) -> bool:
        try:
            return self._tokenizer.has_text
        except GllmError:
            return False

    def _stream_decoder(self, stop: Sequence[str], prompt: Sequence[int]) -> Any:
        """A StreamDecoder, or None for a model without a vocabulary: its generations have ids but no text."""
        if not self._has_text:
            if stop:
                raise RequestError("this model has no vocabulary, so stop strings cannot be found in its output")
            return None
        from .text import StreamDecoder

        return StreamDecoder(self._tokenizer, stop, prompt)

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._load_tokenizer()
