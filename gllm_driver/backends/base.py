"""The Backend protocol: everything the layers above may ask of a device.

Data stays on the device. Weights go up once; KV cache and logits are handles; what comes back per step is a token id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..config import KvCacheConfig, SamplingConfig
from ..types import BatchInput, LogitsTensor, PageMetadata, PageState, SequenceInput, Tensor, Traffic

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


@dataclass(frozen=True)
class KvCacheHandle:
    """A paged KV cache on the device: [num_pages, num_layers, 2, num_kv_heads, page_size, head_dim]."""

    config: KvCacheConfig
    tensor: Tensor


class DecodeLoop(Protocol):
    """One sequence being continued with nothing but the token id crossing to the host per step."""

    def step(self) -> int:
        """Run one forward pass on the last token and sample the next: its id, or −1 if the logits hold no number."""


class Backend(Protocol):
    """A device. Methods raise UnsupportedError when it lacks the feature, BackendError when it fails."""

    name: str
    maps_weights: bool  # weights stay where their file is mapped: they take none of the device's memory
    weight_dtypes: tuple[str, ...]  # stored types its ops compute; matrices of others are repacked by upload_weights

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
    ) -> list[LogitsTensor]:
        """Forward pass over new tokens of several sequences of any lengths and positions; one handle each."""

    def extend(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> None:
        """Forward pass that only fills the KV cache: a prefill chunk that is not the last."""

    def logits_forward(self, weights: WeightsHandle, kv: KvCacheHandle, sequence: SequenceInput) -> np.ndarray:
        """Logits of every new token, copied to the host: f32 [T, vocab]. For inspection, not for generation."""

    def sample_from_tensor(
        self, logits: LogitsTensor, config: SamplingConfig, *, position: int, seen: Sequence[int] = ()
    ) -> int:
        """Choose a token on the device; `position` is that of the token the logits belong to, `seen` the prompt."""

    def start_decode(
        self,
        weights: WeightsHandle,
        kv: KvCacheHandle,
        sequence: SequenceInput,
        config: SamplingConfig,
        prompt: Sequence[int] = (),
    ) -> DecodeLoop:
        """Continue a sequence whose one new token is given; `prompt` is what penalties see besides the output."""

    def prepare(self, dtypes: Iterable[str]) -> None:
        """Get everything ready that weights and KV of these dtypes will need: compile kernels, load modules."""

    def swap_out_pages(self, kv: KvCacheHandle, pages: Sequence[int]) -> None:
        """Move pages to host memory."""

    def swap_in_pages(self, kv: KvCacheHandle, pages: Sequence[int]) -> None:
        """Move pages back to the device."""

    def get_page_states(self, kv: KvCacheHandle) -> Mapping[int, PageState | PageMetadata]:
        """State of every page."""

    def get_memory_pressure(self) -> float:
        """Share of the device's memory in use, 0.0 … 1.0."""

    def available_memory(self) -> int:
        """Bytes of the device's memory that could be reserved now."""

    def embedding_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        """Final hidden states pooled per sequence."""

    def rerank_forward_gpu_pure(self, weights: WeightsHandle, kv: KvCacheHandle, batch: BatchInput) -> Any:
        """Relevance scores of (query, document) sequences."""

    def copy_pages_to_host(self, kv: KvCacheHandle, pages: Sequence[int]) -> np.ndarray:
        """Contents of pages, as bytes [len(pages), page_nbytes]."""

    def copy_pages_from_host(self, kv: KvCacheHandle, pages: Sequence[int], data: np.ndarray) -> None:
        """Overwrite pages with such bytes."""

    def traffic(self) -> Traffic:
        """Bytes that crossed the bus so far."""

    def close(self) -> None:
        """Give everything back. The backend is unusable afterwards."""
