"""The Backend protocol: everything the layers above may ask of a device.

Data stays on the device. Weights go up once; KV cache and logits are handles; what comes back per step is a token id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..config import KvCacheConfig, SamplingConfig
from ..types import BatchInput, LogitsTensor, PageMetadata, PageState, SequenceInput, Tensor, Traffic
from .pooling import Pooling

Progress = Callable[[str, int, int], None]
"""(stage, done, total): stage is "download", "load" or "compile"; done == total ends it."""


class Recorder(Protocol):
    """Where a forward pass puts its op calls, in order."""

    def add(self, op: str, arrays: Mapping[str, Tensor | None], scalars: Mapping[str, float] | None = None) -> None:
        """Append an op call. Raises ContractError."""

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The f32 workspace array of this name (one memory per name, whatever the shape)."""


@dataclass(frozen=True)
class StepTensors:
    """The inputs of one step, on the device. T tokens of S sequences are packed one after another."""

    ids: Tensor  # [T] i32
    positions: Tensor  # [T] i64
    seq: Tensor  # [T] i32, row of page_table
    offsets: Tensor  # [S + 1] i32, first token of each sequence
    page_table: Tensor  # [S, MP] i32
    logits_rows: Tensor | None  # [R] i32, tokens whose logits are wanted; None: every token's
    logits: Tensor | None  # [R or T, vocab] f32; None: no logits wanted
    is_decode: bool  # every sequence has exactly one token
    hidden: Tensor | None = None  # [T, D] f32, final hidden states, where those are wanted


class Forward(Protocol):
    """A model's forward pass: records the ops of one step (gllm_driver.models.decoder)."""

    def __call__(self, recorder: Recorder, weights: Mapping[str, Tensor], kv: Tensor, step: StepTensors) -> None: ...


@dataclass(frozen=True)
class ModelWeights:
    """What a backend is given to upload: host tensors by slot, how to compute with them, and names for messages."""

    tensors: Mapping[str, Tensor]
    sources: Mapping[str, str]  # slot → name in the file
    path: str
    constants: Mapping[str, Tensor]  # small f64/f32 tables the forward pass reads, by slot
    vocab_size: int
    forward: Forward


@dataclass(frozen=True)
class WeightsHandle:
    """Weights on the device."""

    tensors: Mapping[str, Tensor]
    vocab_size: int
    forward: Forward
    nbytes: int


class PageTracker(Protocol):
    """Who knows the state of a cache's pages (gllm_driver.kv.manager)."""

    def page_states(self) -> Mapping[int, PageMetadata]: ...


@dataclass(eq=False)
class KvCacheHandle:
    """A paged KV cache on the device: [num_pages, num_layers, 2, num_kv_heads, page_size, head_dim]."""

    config: KvCacheConfig
    tensor: Tensor
    tracker: PageTracker | None = None  # set by whoever manages the pages
    host_slots: Any = field(repr=False, default=None)  # the backend's, made by alloc_swap_space


class StageBuffer(Protocol):
    """Host memory for some pages. It is free for others again when nobody refers to it."""

    data: np.ndarray  # u8 [num_pages, page_nbytes]

    def wait(self) -> None:
        """Return when the copy that was issued last is done. Any thread may call this. Raises BackendError."""


class PageStage(Protocol):
    """Host memory that pages pass through, beside the steps: on their way to a store, or back from one.

    Copies are issued by the thread that runs the steps and stand in order with these; nobody waits for them but who
    calls `StageBuffer.wait`, and steps that need what they bring. A copy that cannot be issued raises BackendError.
    """

    def take(self) -> StageBuffer | None:
        """A buffer for `to_host`, None when all are in use. Any thread may call this."""

    def hold(self, rows: np.ndarray) -> StageBuffer | None:
        """A buffer with these pages in it, u8 [num_pages, page_nbytes]; None when all are in use. Any thread."""

    def to_host(self, pages: Sequence[int], buffer: StageBuffer) -> None:
        """Copy pages to the first rows of a buffer. The pages may be given to others at once."""

    def to_device(self, buffer: StageBuffer, pages: Sequence[int], first: int = 0) -> None:
        """Copy rows `first` … of a buffer to pages, none of which comes twice."""

    def close(self) -> None:
        """Give the memory back, once copies are done; buffers must not be used any more."""


@dataclass(frozen=True)
class DecodeRow:
    """A sequence to be continued by a decode loop."""

    token: int  # its newest token, not in the KV cache yet
    position: int  # of that token
    pages: Sequence[int]  # in order, enough for the next step; the loop hears of more through set_pages
    sampling: SamplingConfig
    prompt: Sequence[int] = ()  # prompt and output are what penalties look at; `output` includes `token`
    output: Sequence[int] = ()


@dataclass(frozen=True)
class SampleRow:
    """Logits to choose a token from."""

    logits: LogitsTensor
    sampling: SamplingConfig
    position: int  # of the token the logits belong to
    prompt: Sequence[int] = ()  # as in DecodeRow
    output: Sequence[int] = ()


class DecodeLoop(Protocol):
    """Sequences being continued together, with nothing but token ids crossing to the host per step."""

    def step(self) -> list[int]:
        """Run one forward pass on the last tokens and sample the next: an id per row, −1 where there is no number."""

    def set_pages(self, row: int, pages: Sequence[int]) -> None:
        """The row's sequence has these pages from the next step on: the ones it had, and more."""

    def close(self) -> None:
        """No step follows. Closing twice does nothing."""


class Backend(Protocol):
    """A device. Methods raise UnsupportedError when it lacks the feature, BackendError when it fails."""

    name: str
    maps_weights: bool  # weights stay where their file is mapped: they take none of the device's memory
    weight_dtypes: tuple[str, ...]  # stored types its ops compute; matrices of others are repacked by upload_weights

    @property
    def numerics(self) -> str:
        """Names whatever decides the last bits of its results: kernels, architecture."""

    def upload_weights(
        self, model: ModelWeights, *, dtype: str = "auto", progress: Progress | None = None
    ) -> WeightsHandle:
        """Put weights on the device, once. `dtype` f32/f16/bf16 converts float matrices; auto keeps them as stored.

        Norms and biases become f32. Raises ModelFormatError for NaN or infinite values, with the tensor's name.
        """

    def alloc_kv_cache(self, config: KvCacheConfig) -> KvCacheHandle:
        """Reserve a KV cache. Raises CapacityError when it does not fit."""

    def generator_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput
    ) -> LogitsTensor:
        """Forward pass over new tokens of one sequence; a handle to the logits of its last token."""

    def batch_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput
    ) -> list[LogitsTensor | None]:
        """Forward pass over new tokens of several sequences of any lengths and positions.

        A handle to the logits of each sequence's last token, None where the sequence wants none.
        """

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        """Forward pass that only fills the KV cache: a prefill chunk that is not the last."""

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        """Logits of every new token, copied to the host: f32 [T, vocab]. For inspection, not for generation."""

    def sample_from_tensor(
        self,
        logits: LogitsTensor,
        config: SamplingConfig,
        *,
        position: int,
        prompt: Sequence[int] = (),
        output: Sequence[int] = (),
    ) -> int:
        """Choose a token on the device; `position` is that of the token the logits belong to.

        Penalties look at `prompt` and `output`. −1: the logits hold no number.
        """

    def sample_rows(self, rows: Sequence[SampleRow]) -> list[int]:
        """sample_from_tensor for several sequences of one forward pass, waiting once for all."""

    def start_decode(self, weights: WeightsHandle, kv: KvCacheHandle, rows: Sequence[DecodeRow]) -> DecodeLoop:
        """Continue sequences, each with one new token, for as long as they are the same ones."""

    def prepare(self, dtypes: Iterable[str]) -> None:
        """Get everything ready that weights and KV of these dtypes will need: compile kernels, load modules."""

    def alloc_swap_space(self, kv: KvCacheHandle, num_slots: int) -> None:
        """Reserve host memory for `num_slots` pages of this cache. Raises CapacityError when it does not fit."""

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy pages to host slots, in order with the steps before and after; the pages are then free for others."""

    def swap_in_pages(self, kv: KvCacheHandle, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy host slots to pages, in order with the steps before and after; the slots are then free for others."""

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageMetadata]:
        """What is known of every page by its number, and of swapped ones by theirs (see the cache's tracker)."""

    def get_memory_pressure(self) -> float:
        """Share of the device's memory in use, 0.0 … 1.0."""

    def available_memory(self) -> int:
        """Bytes of the device's memory that could be reserved now."""

    def embedding_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, pooling: Pooling = "last"
    ) -> np.ndarray:
        """Final hidden states pooled per sequence, f32 [S, D] on the host: all that crosses the bus.

        The batch has whole sequences of any lengths; they are computed in steps of bounded size. pooling: the last
        token's, the first one's ("cls"), or the mean of all.
        """

    def rerank_forward_gpu_pure(
        self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput, *, ids: Sequence[int] | None = None
    ) -> np.ndarray:
        """Scores of whole sequences, f32 [S, N] on the host: by the head of a model for classification (its labels),
        or, with `ids`, the logits of those tokens after the last one. Raises RequestError where there is no head.
        """

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        """Contents of pages, as bytes [len(pages), page_nbytes]."""

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        """Overwrite pages with such bytes."""

    def page_stage(self, kv: KvCacheHandle, num_pages: int, num_buffers: int) -> PageStage:
        """Buffers of `num_pages` pages of this cache. Raises CapacityError when the host has no room for them."""

    def traffic(self) -> Traffic:
        """Bytes that crossed the bus so far, and how fast KV pages moved."""

    def close(self) -> None:
        """Give everything back. The backend is unusable afterwards."""


def page_states(kv: KvCacheHandle) -> Mapping[int, PageMetadata]:
    """What the cache's tracker says; without one nobody uses the pages: all are idle on the device."""
    if kv.tracker is not None:
        return kv.tracker.page_states()
    return {page: PageMetadata(page, None, PageState.STANDBY) for page in range(kv.config.num_pages)}


def checked(numbers: Sequence[int], limit: int, what: str) -> list[int]:
    """Page or slot numbers as a list. Raises IndexError for one outside the cache."""
    for number in numbers:
        if not 0 <= number < limit:
            raise IndexError(f"{what} {number} of a KV cache of {limit} {what}s")
    return [int(number) for number in numbers]
