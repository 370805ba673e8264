"""The key-value pairs of a GGUF file: those of the source, or what a Hugging Face directory says, in GGUF's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFormatError
from ..loaders.gguf import read_gguf
from ..loaders.open import GGUF_METADATA
from ..models.arch import Arch
from ..models.checkpoint import Checkpoint
from ..models.rope import rope_inv_freq, yarn_attention_factor
from ..types import DType
from .gguf_vocab import vocabulary
from .gguf_writer import pair
from .plan import gguf_architecture, is_from_gguf

# general.file_type, which says what most matrices are; types without a number there get that of "guessed".
_FILE_TYPES = {
    **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11},
    **{"q4_k": 14, "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32},
}
_GUESSED = 1024
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json")  # GGUF's metadata are beside such
_QUANTIZATION_VERSION = 2
# Keys of the source that are about its file, not its model.
_OF_THE_FILE = ("general.file_type", "general.quantization_version", "general.alignment")


def gguf_pairs(checkpoint: Checkpoint, dtype: DType | None) -> list[bytes]:
    """The pairs for a file whose matrices are mostly `dtype`; None: for a file without tensors.

    Raises ModelFormatError for settings and vocabularies that GGUF has no words for.
    """
    if is_from_gguf(checkpoint):
        path = checkpoint.path
        source = read_gguf(path.parent / GGUF_METADATA if path.name.endswith(_WEIGHT_FILES) else path)
        pairs = [source.pair(k) for k in source.pairs if k not in _OF_THE_FILE and not k.startswith("split.")]
    else:
        values = {**_model(checkpoint), **vocabulary(checkpoint)}
        pairs = [pair(key, value) for key, value in values.items()]
    if dtype is not None:
        pairs.append(pair("general.file_type", _FILE_TYPES.get(dtype.name, _GUESSED)))
        pairs.append(pair("general.quantization_version", _QUANTIZATION_VERSION))
    return pairs


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    arch, path = checkpoint.arch, checkpoint.path
    name = gguf_architecture(arch)
    values: dict[str, Any] = {
        "vocab_size": arch.vocab_size,
        "context_length": arch.context_length,
        "embedding_length": arch.hidden_size,
        "block_count": arch.num_layers,
        "feed_forward_length": arch.intermediate_size,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": arch.num_kv_heads,
        f"attention.layer_norm_{'rms_' if arch.norm == 'rms' else ''}epsilon": arch.norm_eps,
    }
    if arch.alibi_max_bias:
        values["attention.max_alibi_bias"] = arch.alibi_max_bias
    else:
        values |= {"attention.key_length": arch.head_dim, "attention.value_length": arch.head_dim}
        values |= {"rope.dimension_count": arch.rotary_dim, "rope.freq_base": arch.rope_theta}
        values |= _rope_scaling(arch, path)
    if any(arch.sliding_windows):
        if len(set(arch.sliding_windows)) > 1:
            raise ModelFormatError("some layers see a window and others do not, which GGUF has no key for", path=path)
        values["attention.sliding_window"] = arch.sliding_windows[0]
    general: dict[str, Any] = {"general.architecture": name, "general.name": _title(path)}
    defaults = checkpoint.defaults
    sampling: dict[str, float | None] = {
        "temp": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "penalty_repeat": defaults.repetition_penalty,
    }
    general |= {f"general.sampling.{key}": value for key, value in sampling.items() if value is not None}
    return {**general, **{f"{name}.{key}": value for key, value in values.items()}}


def _title(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.resolve().parent.name


def _rope_scaling(arch: Arch, path: Path) -> dict[str, Any]:
    scaling = arch.rope_scaling
    if scaling.kind in ("none", "llama3", "factors"):  # the latter two: in a tensor
        return {}
    if scaling.kind == "ntk" and scaling.original_context_length >= arch.context_length:
        return {}  # within the context it changes nothing
    if scaling.kind == "ntk":
        raise ModelFormatError("RoPE scaling 'dynamic' cannot be said in GGUF", path=path)
    values: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_context_length
        values["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        values["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
        if scaling.attention_factor is not None:  # a file's number multiplies what the method prescribes
            prescribed = yarn_attention_factor(scaling.factor)
            values["rope.scaling.attn_factor"] = scaling.attention_factor / prescribed
    return values


def rope_factors(arch: Arch) -> np.ndarray | None:
    """Llama 3.1's scaling as GGUF says it, one divisor per frequency: f32 [rotary_dim / 2]; None for other models."""
    if arch.rope_scaling.kind != "llama3":
        return None
    scaled, _ = rope_inv_freq(arch, None, arch.context_length)
    plain = arch.rope_theta ** (-np.arange(0, arch.rotary_dim, 2, dtype=np.float64) / arch.rotary_dim)
    return (plain / scaled).astype(np.float32)
