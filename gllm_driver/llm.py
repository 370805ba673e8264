"""The Python API: load a model, generate text, look at logits."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import KvCacheConfig, SamplingConfig
from .engine import Engine, Progress, Request
from .errors import BackendError, CapacityError, GllmError, RequestError
from .types import DTYPES, FLOAT_DTYPES, Traffic

if TYPE_CHECKING:
    from .backends.base import Backend
    from .loaders.tokenizer import Tokenizer
    from .models.arch import Arch
    from .models.checkpoint import Checkpoint

log = logging.getLogger("gllm_driver")

PAGE_SIZE = 16
KV_MEMORY_SHARE = 0.5  # of the free memory, what the default context may take at most


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds; rates in tokens per second (0 where nothing was measured)."""

    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class GenerationResult:
    """What was generated. `tokens` and `text` are without the prompt and without the token that ended it.

    finish_reason: "stop" (end token or stop string), "length" (max_tokens or context), "interrupted" (stopped early).
    A stop string is cut from `text`, but the tokens it came in stay in `tokens`.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: str
    timings: Timings
    traffic: Traffic
    device: str


class TextStream:
    """Iterator over pieces of text; `result` is what has been generated so far. Closing it stops the generation."""

    def __init__(self, llm: LLM, request: Request, stop: Sequence[str]) -> None:
        self._llm = llm
        self._request = request
        self._progress = Progress()
        self._text: list[str] = []
        self._traffic = llm._backend.traffic()
        self._pieces = self._run(stop)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating; `result` then says "interrupted" unless the generation had ended by itself."""
        self._pieces.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, stop: Sequence[str]) -> Any:
        decoder = self._llm._stream_decoder(stop, self._request.tokens)
        tokens = self._llm._engine.generate(self._request, self._progress)
        try:
            for token in tokens:
                piece = decoder.push(token) if decoder else ""
                if piece:
                    self._text.append(piece)
                    yield piece
                if decoder and decoder.stopped_by is not None:
                    self._progress.finish_reason = "stop"
                    return
            rest = decoder.finish() if decoder else ""
            if rest:
                self._text.append(rest)
                yield rest
        finally:
            tokens.close()  # type: ignore[attr-defined]

    @property
    def result(self) -> GenerationResult:
        """The generation so far."""
        progress, now = self._progress, self._llm._backend.traffic()
        prompt_tokens = len(self._request.tokens)
        return GenerationResult(
            text="".join(self._text),
            tokens=list(progress.tokens),
            prompt_tokens=prompt_tokens,
            finish_reason=progress.finish_reason or "interrupted",
            timings=Timings(
                load_s=self._llm.load_s,
                prefill_s=progress.prefill_s,
                decode_s=progress.decode_s,
                prefill_tokens_per_s=prompt_tokens / progress.prefill_s if progress.prefill_s else 0.0,
                decode_tokens_per_s=progress.decode_steps / progress.decode_s if progress.decode_s else 0.0,
            ),
            traffic=Traffic(now.h2d_bytes - self._traffic.h2d_bytes, now.d2h_bytes - self._traffic.d2h_bytes),
            device=self._llm.device,
        )


class LLM:
    """A loaded model. Made by `load`; close it, or use it as a context manager, to give its memory back.

    One generation runs at a time; a second one started before the first ends raises RequestError.
    """

    def __init__(self, checkpoint: Checkpoint, backend: Backend, engine: Engine, load_s: float) -> None:
        self._checkpoint = checkpoint
        self._backend = backend
        self._engine = engine
        self._running: TextStream | None = None
        self.load_s = load_s

    @property
    def arch(self) -> Arch:
        """The model's numbers."""
        return self._checkpoint.arch

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self._backend.name

    @property
    def context_length(self) -> int:
        """Tokens that prompt and output may have together."""
        return self._engine.context_length

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelFormatError when the model brings none that can be read."""
        from .loaders.tokenizer import Tokenizer

        path, metadata = self._checkpoint.path, self._checkpoint.metadata
        if "tokenizer.ggml.model" in metadata:
            return Tokenizer.from_gguf(metadata, path)
        return Tokenizer.from_directory(path if path.is_dir() else path.parent)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> GenerationResult:
        """Generate until an end; the options are those of `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
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
    ) -> TextStream:
        """Generate text piece by piece.

        prompt: text (special-token strings in it are text), or token ids, taken as they are. Sampling options left at
        None take what the model's authors recommend, else the neutral value (temperature 0: greedy, but 1 when top_k,
        top_p or min_p ask for draws); `SamplingConfig` explains them. seed None: a fresh random one. stop: strings that
        end the generation and are not shown.

        Raises RequestError for an empty prompt, ids outside the vocabulary, options out of range; CapacityError when
        the prompt leaves no room in the context.
        """
        if isinstance(stop, str):
            stop = (stop,)
        if any(not s for s in stop):
            raise RequestError("a stop string must not be empty")
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: give at least one character")
            tokens: Sequence[int] = self.tokenizer.encode(prompt)
        else:
            tokens = [int(t) for t in prompt]
        defaults = self._checkpoint.defaults
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
        request = Request(tokens, sampling, max_tokens, frozenset() if ignore_eos else self._eos_token_ids)
        self._engine.check(request)
        return TextStream(self, request, stop)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after each token of a sequence: f32 [T, vocab_size]. Raises RequestError, CapacityError."""
        return self._engine.logits([int(t) for t in token_ids])

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's chat format, ready to be answered.

        messages: {"role": …, "content": …} in order. Raises RequestError when the model has no chat template or the
        template refuses the messages.
        """
        from .loaders.chat import ChatTemplate, encode_chat

        return encode_chat(self.tokenizer, ChatTemplate.of(self.tokenizer), messages)

    @cached_property
    def _eos_token_ids(self) -> frozenset[int]:
        ids = set(self._checkpoint.defaults.eos_token_ids)
        if self._has_text:
            ids |= self.tokenizer.eos_token_ids
        return frozenset(ids)

    @cached_property
    def _has_text(self) -> bool:
        try:
            return self.tokenizer.has_text
        except GllmError:
            return False

    def _stream_decoder(self, stop: Sequence[str], prompt: Sequence[int]) -> Any:
        """A StreamDecoder, or None for a model without a vocabulary: its generations have ids but no text."""
        if not self._has_text:
            if stop:
                raise RequestError("this model has no vocabulary, so stop strings cannot be found in its output")
            return None
        from .text import StreamDecoder

        return StreamDecoder(self.tokenizer, stop, prompt)

    def close(self) -> None:
        """Release threads and memory. The object cannot be used afterwards."""
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def demo_model_path() -> Path:
    """The small demonstration model that is part of the package."""
    return Path(__file__).parent / "demo" / "gllm-demo-q8_0.gguf"


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    context_length: int | None = None,
    deterministic: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> LLM:
    """Load a model.

    path: a Hugging Face directory, a .gguf or .safetensors file, or a hub id (org/name); None is the demonstration
    model. device: auto, cpu, cuda or cuda:N. dtype: f32, f16 or bf16 for float weights and the KV cache; auto keeps
    weights as stored. threads: CPU threads, by default all this process may use. context_length: tokens of prompt and
    output together, by default the model's own, or what half of the free memory holds. deterministic: a request's
    result is the same to the last bit whatever shares its steps (on the CPU it always is). progress(stage, done, total)
    hears of "download", "load" and "compile".

    With auto, a model that does not fit on the GPU, or a GPU that fails, means the CPU, with a warning in the log.

    Raises ModelFormatError, HubError, BackendUnavailableError, CapacityError, RequestError.
    """
    from .backends.select import open_backend
    from .loaders.open import open_checkpoint

    start = time.perf_counter()
    if dtype != "auto" and dtype not in FLOAT_DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}: choose auto, {', '.join(FLOAT_DTYPES)}")
    checkpoint = open_checkpoint(demo_model_path() if path is None else path, progress=None if progress else False)
    backend = open_backend(device, threads=threads, deterministic=deterministic, progress=progress)
    try:
        engine = _place(checkpoint, backend, dtype, context_length, progress)
    except (CapacityError, BackendError) as error:
        if device != "auto" or backend.name == "cpu":
            raise
        log.warning("using the CPU: %s", error)
        backend = open_backend("cpu", threads=threads, progress=progress)
        engine = _place(checkpoint, backend, dtype, context_length, progress)
    return LLM(checkpoint, backend, engine, time.perf_counter() - start)


def _place(
    checkpoint: Checkpoint,
    backend: Backend,
    dtype: str,
    context_length: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Engine:
    """Weights and KV cache on a device, which is closed when that fails."""
    from .models.decoder import model_weights

    try:
        arch = checkpoint.arch
        kv_dtype = dtype if dtype != "auto" else default_kv_dtype(checkpoint)
        one_page = KvCacheConfig(1, arch.num_layers, arch.num_kv_heads, arch.head_dim, PAGE_SIZE, kv_dtype)
        free = backend.available_memory() - (0 if backend.maps_weights else _weights_nbytes(checkpoint, dtype))
        fits = int(KV_MEMORY_SHARE * max(free, 0)) // one_page.page_nbytes * PAGE_SIZE
        context = _context_length(arch.context_length, context_length, fits)
        backend.prepare({t.dtype.name for t in checkpoint.tensors.values()} | {kv_dtype})
        weights = backend.upload_weights(model_weights(checkpoint, context), dtype=dtype, progress=progress)
        num_pages = -(-context // PAGE_SIZE)
        kv = KvCacheConfig(num_pages, arch.num_layers, arch.num_kv_heads, arch.head_dim, PAGE_SIZE, kv_dtype)
        return Engine(backend, weights, kv, context)
    except BaseException:
        backend.close()
        raise


def default_kv_dtype(checkpoint: Checkpoint) -> str:
    """f32 models keep an f32 cache, bf16 ones (whose range f16 lacks) bf16; all others f16."""
    stored = checkpoint.tensors["layers.0.k"].dtype.name
    return stored if stored in FLOAT_DTYPES else "f16"


def _weights_nbytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of the weights once float matrices are in `dtype`."""
    tensors = {t.address: t for t in checkpoint.tensors.values()}.values()  # tied ones once
    return sum(
        t.nbytes if dtype == "auto" or t.dtype.is_quantized else t.num_rows * DTYPES[dtype].row_nbytes(t.shape[-1])
        for t in tensors
    )


def _context_length(models: int, wanted: int | None, fits: int) -> int:
    """The context asked for, else the model's own as far as it fits in memory."""
    if wanted is not None:
        if wanted < 1:
            raise RequestError(f"context_length must be at least 1, got {wanted}")
        if wanted > models:
            raise RequestError(f"context_length {wanted} is more than the {models} tokens the model was made for")
        return wanted
    return max(min(models, fits), min(models, PAGE_SIZE))
