"""The Python API: load a model, generate text, look at logits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .config import DistillConfig, SwapConfig
from .engine import Engine, Request
from .errors import BackendError, CapacityError, GllmError, RequestError
from .generation import AsyncTextStream, Circumstances, GenerationOptions, GenerationResult, TextStream
from .metrics import Metrics
from .placement import Sharing, place
from .prompts import Prompts
from .types import FLOAT_DTYPES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .backends.base import Backend
    from .backends.pooling import Pooling
    from .distillation import DistillationCost
    from .embedding import SequenceReader
    from .engine.async_engine import AsyncEngine
    from .engine.core import LogitsVisitor
    from .kv.store import KvStore
    from .loaders.tokenizer import Tokenizer
    from .models.arch import Arch
    from .models.checkpoint import Checkpoint

log = logging.getLogger("gllm_driver")

T = TypeVar("T")


class LLM:
    """A loaded model. Made by `load`; close it, or use it as a context manager, to give its memory back.

    Any number of generations may run at the same time, in one thread or in several; they share the model's steps, and
    each gets what it would get alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        engine: Engine,
        load_s: float,
        store: KvStore | None = None,
    ) -> None:
        self.weight_types = _weight_types(checkpoint)
        if not backend.maps_weights:  # copies of converted matrices must not stay in host memory
            checkpoint = replace(checkpoint, tensors={})
        self._store = store  # to be closed with it
        self._checkpoint = checkpoint
        self._backend = backend
        self._engine = engine
        self._async_engine: AsyncEngine | None = None
        self._prompts = Prompts(engine, checkpoint.defaults, lambda: self.tokenizer)
        self.load_s = load_s

    @property
    def path(self) -> Path:
        """Where its files are."""
        return self._checkpoint.path

    @property
    def arch(self) -> Arch:
        """The model's numbers."""
        return self._checkpoint.arch

    @property
    def device(self) -> str:
        """The device it runs on."""
        return self._backend.name

    @property
    def kv_dtype(self) -> str:
        """Type of the KV cache."""
        return self._engine.kv.config.dtype

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

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Generate until an end; the options are those of `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        return_errors: bool = False,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult | GllmError]:
        """Generate for several prompts together; results in their order, options as in `stream`.

        The first error ends the whole, unless `return_errors`: then it stands in the place of its result, and the
        others go on.
        """
        if isinstance(prompts, str):
            raise RequestError("generate_batch takes several prompts: give a list, or use generate")
        streams = [_caught(partial(self.stream, prompt, **options), return_errors) for prompt in prompts]
        try:
            return [s if isinstance(s, GllmError) else _caught(s.read_all, return_errors) for s in streams]
        finally:
            for stream in streams:
                if isinstance(stream, TextStream):
                    stream.close()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """Generate text piece by piece.

        prompt: text (special-token strings in it are text), or token ids, taken as they are. Options, all by name:

        max_tokens=256. temperature, top_k, top_p, min_p, repetition_penalty: left out, they take what the model's
        authors recommend, else the neutral value (temperature 0: greedy, but 1 when top_k, top_p or min_p ask for
        draws). presence_penalty, frequency_penalty: 0. `SamplingConfig` explains them. seed: a fresh random one.
        stop=(): strings that end the generation and are not shown. ignore_eos=False: go on past the model's end tokens.
        priority=0: higher ones go first. flow="": whose request it is; flows get equal shares. deadline_s: seconds
        after which it ends with what it has.

        Raises RequestError for an empty prompt, ids outside the vocabulary, options out of range; CapacityError when
        the prompt leaves no room in the context, or the KV cache cannot hold it.
        """
        request, text = self._prompts.request(prompt, **options)
        return TextStream(self._engine.submit(request), text, self._circumstances(request))

    def async_stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> AsyncTextStream:
        """`stream` for asyncio: to be called inside a running event loop. A thread of its own runs the steps."""
        from .engine.async_engine import AsyncEngine

        if self._async_engine is None:
            self._async_engine = AsyncEngine(self._engine)
        request, text = self._prompts.request(prompt, **options)
        return AsyncTextStream(self._async_engine.submit(request), text, self._circumstances(request))

    @property
    def metrics(self) -> Metrics:
        """What runs, what waits, and how long things took; `str()` of it is a table."""
        return self._engine.metrics

    def _circumstances(self, request: Request) -> Circumstances:
        return Circumstances(self.device, self.load_s, len(request.tokens), self._backend.traffic)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after each token of a sequence: f32 [T, vocab_size]. Raises RequestError, CapacityError."""
        return self._engine.logits([int(t) for t in token_ids])

    def read_logits(self, sequences: Sequence[Sequence[int]], visit: LogitsVisitor, first: int = 0) -> None:
        """Show logits of sequences of one length from position `first` on, in bounded memory.

        visit(i, position, logits) hears of f32 [n, vocab_size] after the tokens of sequence i from `position` on, all
        of them in order; meanwhile nothing else runs. Raises RequestError, CapacityError, and what `visit` raises.
        """
        self._engine.read_logits(sequences, visit, first)

    def sequences_at_once(self, length: int, first: int) -> int:
        """How many sequences of so many tokens suit one call of `read_logits`."""
        return self._engine.sequences_at_once(length, first)

    def embed(
        self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling | None = None, normalize: bool = True
    ) -> np.ndarray:
        """Vectors of texts (or token ids): f32 [len(texts), hidden_size], of length 1 where `normalize`.

        pooling: the final hidden state of the "last" token, of the first one ("cls"), or the "mean" of all; without it
        what the model's files say (1_Pooling/config.json), or the last. Raises RequestError, CapacityError.
        """
        return self._sequence_reader.embed(texts, pooling, normalize)

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> list[float]:
        """How well each document answers the query; higher is better, 0 … 1 where the model has no head that scores.

        A model with such a head (…ForSequenceClassification, one label) gives its score. Any other is asked, in the
        words of Qwen3-Reranker, and its probability of "yes" against "no" counts. Options: `template` with {query},
        {document} and {instruction}, `instruction`, `answers` (the two words). Raises RequestError, CapacityError.
        """
        return self._sequence_reader.rerank(query, documents, **options)

    @cached_property
    def _sequence_reader(self) -> SequenceReader:
        from .embedding import SequenceReader

        return SequenceReader(self._engine, lambda text: self.tokenizer.encode(text), self.arch, self.path)

    def distillation_cost(self, text: str | Sequence[int], config: DistillConfig, **options: Any) -> DistillationCost:
        """What merging KV as `config` says costs on a text: perplexity behind distilled contexts, and bytes.

        Options: `context`, `continuation` and `max_windows` (gllm_driver.distillation.cost). Raises RequestError,
        CapacityError.
        """
        from .distillation import cost

        tokens = self.tokenizer.encode(text) if isinstance(text, str) else text
        return cost(self._engine, tokens, self._engine.rope, config, **options)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's chat format, ready to be answered.

        messages: {"role": …, "content": …} in order. Raises RequestError when the model has no chat template or the
        template refuses the messages.
        """
        from .loaders.chat import ChatTemplate, encode_chat

        return encode_chat(self.tokenizer, ChatTemplate.of(self.tokenizer), messages)

    def close(self) -> None:
        """Release threads and memory; generations that run end as interrupted. The object cannot be used afterwards."""
        self._engine.close()
        if self._async_engine is not None:
            self._async_engine.close()
        if self._store is not None:
            self._store.close()
        self._backend.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _caught(act: Callable[[], T], catch: bool) -> T | GllmError:
    """What `act` returns, or the error it raises where that is wanted."""
    try:
        return act()
    except GllmError as error:
        if not catch:
            raise
        return error


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
    max_batch: int = 16,
    chunk_size: int | None = 64,
    prefix_reuse: bool = True,
    kv_tokens: int | None = None,
    cpu_reserve_mb: int = 512,
    kv_store: str | KvStore | None = None,
    kv_distill: str | DistillConfig | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> LLM:
    """Load a model.

    path: a Hugging Face directory, a .gguf or .safetensors file, or a hub id (org/name); None is the demonstration
    model. device: auto, cpu, cuda or cuda:N. dtype: f32, f16 or bf16 for float weights and the KV cache; auto keeps
    weights as stored. threads: CPU threads, by default all this process may use. context_length: tokens of prompt and
    output together, by default the model's own, or what half of the free memory holds. deterministic: a request's
    result is the same to the last bit whatever shares its steps (on the CPU it always is). progress(stage, done, total)
    hears of "download", "load" and "compile".

    Several requests: max_batch of them share a step. While some generate, at most chunk_size prompt tokens of others
    join each step, which bounds how long a token takes; None: no bound. prefix_reuse: prompts that begin alike share
    that beginning. kv_tokens: tokens that all requests together have room for on the device, at least a context by
    default and max_batch of them where half of the free memory suffices; what does not fit waits, or is moved to at
    most cpu_reserve_mb of host memory and back (0: computed again instead).

    kv_store: where KV of prompts is kept beyond a request and a process, such as
    "memory:2GiB,disk:/path?cap=20GiB,redis://host:6379/0" (docs/kv-store.md), or a store that stays open. With
    deterministic, KV is shared only with what computes it to the same bits; without, a GPU and a CPU share theirs.

    kv_distill: "2", "4" or "8": where memory for KV runs short, old tokens of a request are merged, so many into one,
    before anything is swapped out. That changes what models say (docs/kv-distillation.md); not with deterministic.

    With auto, a model that does not fit on the GPU, or a GPU that fails, means the CPU, with a warning in the log.

    Raises ModelFormatError, HubError, BackendUnavailableError, CapacityError, RequestError.
    """
    from .backends.select import open_backend
    from .loaders.open import open_checkpoint

    start = time.perf_counter()
    if dtype != "auto" and dtype not in FLOAT_DTYPES:
        raise RequestError(f"unknown dtype {dtype!r}: choose auto, {', '.join(FLOAT_DTYPES)}")
    swap = SwapConfig(enable_swap=cpu_reserve_mb > 0, cpu_reserve_mb=max(cpu_reserve_mb, 0))
    distill = _distill_config(kv_distill, deterministic)
    with ExitStack() as cleanup:
        store = _open_store(kv_store, deterministic, cleanup)
        sharing = Sharing(max_batch, chunk_size, prefix_reuse, kv_tokens, swap, store, distill)
        checkpoint = open_checkpoint(demo_model_path() if path is None else path, progress=None if progress else False)
        backend = open_backend(device, threads=threads, deterministic=deterministic, progress=progress)
        try:
            engine = place(checkpoint, backend, dtype, context_length, progress, sharing, deterministic)
        except (CapacityError, BackendError) as error:
            if device != "auto" or backend.name == "cpu":
                raise
            log.warning("using the CPU: %s", error)
            backend = open_backend("cpu", threads=threads, progress=progress)
            engine = place(checkpoint, backend, dtype, context_length, progress, sharing, deterministic)
        cleanup.pop_all()
    return LLM(checkpoint, backend, engine, time.perf_counter() - start, store if store is not kv_store else None)


def _distill_config(given: str | DistillConfig | None, deterministic: bool) -> DistillConfig | None:
    """What is asked of KV that must make room. Raises RequestError."""
    config = DistillConfig.parse(given) if isinstance(given, str) else given
    if config is None:
        return None
    if deterministic:
        raise RequestError(
            "kv_distill changes what a model says and contradicts deterministic mode: leave one of them out"
        )
    if config.method != "tokens":
        raise RequestError(f"kv_distill merges tokens; method {config.method!r} is for KV at rest: give 2, 4 or 8")
    return config


def _open_store(given: str | KvStore | None, deterministic: bool, cleanup: ExitStack) -> KvStore | None:
    """The store that is given or described; one that is opened here is closed when the load fails."""
    if not isinstance(given, str):
        return given
    from .kv.store import open_store

    store = open_store(given, deterministic=deterministic)
    cleanup.callback(store.close)
    return store


def _weight_types(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the weights by the type they are stored in, the most first."""
    nbytes: dict[str, int] = {}
    for tensor in {t.address: t for t in checkpoint.tensors.values()}.values():  # tied ones once
        nbytes[tensor.dtype.name] = nbytes.get(tensor.dtype.name, 0) + tensor.nbytes
    return dict(sorted(nbytes.items(), key=lambda kind: -kind[1]))
