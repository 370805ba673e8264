"""A model as it lies on disk, described but not copied: the boundary between `loaders/` and everything above it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..types import Tensor
from .arch import Arch


@dataclass(frozen=True)
class GenerationDefaults:
    """What the model's authors recommend (generation_config.json, GGUF keys). None: they say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """One opened model. `tensors` maps the slots of `tensor_slots(arch)` to memory-mapped host tensors of exactly those
    shapes; `sources` maps the same slots to the names the tensors have in the file, for error messages."""

    path: Path
    arch: Arch
    tensors: Mapping[str, Tensor]
    sources: Mapping[str, str]
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the file's own keys, for the tokenizer and for display

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors."""
        return sum({t.address: t.nbytes for t in self.tensors.values()}.values())
