"""GGUF key-value pairs → `Arch`. The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("LLM")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFormatError
from .arch import Arch, RopeScaling
from .families import Family, checked, family_of_gguf
from .fields import MAX_LAYERS, Fields
from .names import GGUF_NAMES, Described
from .rope import yarn_attention_factor

# Keys (after "{arch}.") that `arch_of_gguf` reads, and keys that do not change the computation.
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
_READ_WITH_ALIBI = {key for key in _READ if not key.startswith("rope.")} | {"attention.max_alibi_bias"}
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.layer_norm_epsilon"}
# Every other key of the architecture must have a value that turns it off: these, or one listed here.
_OFF = (0, 0.0, False, "")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "logit_scale": (1.0,),
    "residual_scale": (1.0,),
    "embedding_scale": (1.0,),
}


def arch_of_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Described], path: Path) -> Arch:
    """The description in a file's `metadata`; what no key says (biases, tied embeddings) is seen from its `tensors`.

    Raises ModelFormatError for an unknown architecture, a missing or impossible value, and any key of the architecture
    that would change the computation in a way this version does not implement.
    """
    architecture = metadata.get("general.architecture")
    family = family_of_gguf(architecture, path)
    prefix = f"{architecture}."
    values = {key[len(prefix) :]: _uniform(value) for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(values, path, prefix)
    read = _READ_WITH_ALIBI if family.alibi_max_bias else _READ
    fields.refuse({key: _NEUTRAL.get(key, _OFF) for key in sorted(values.keys() - read - _HARMLESS)})

    hidden_size = fields.integer("embedding_length")
    num_layers = fields.integer("block_count", high=MAX_LAYERS)
    num_heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", max(hidden_size // num_heads, 1), high=65536)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.wrong("attention.value_length", f"{head_dim}, the length of keys")
    window = fields.integer("attention.sliding_window", 0, low=0)
    names = family.gguf_names
    layer = {slot for slot, name in names.layer.items() if names.layer_prefix.format(i=0) + name in tensors}
    return checked(
        Arch(
            family=family.name,
            vocab_size=_vocab_size(fields, metadata, tensors),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            context_length=fields.integer("context_length"),
            norm=family.norm,
            norm_eps=fields.number(f"attention.layer_norm_{'rms_' if family.norm == 'rms' else ''}epsilon"),
            norm_bias="attn_norm_bias" in layer,
            embed_norm=family.embed_norm,
            **_positions(fields, family, head_dim, has_factors=names.model["rope_factors"] in tensors),
            qkv_bias="q_bias" in layer,
            o_bias="o_bias" in layer,
            mlp_bias="down_bias" in layer,
            gated_mlp=family.gated_mlp,
            activation=family.activation or "silu",
            qk_norm=family.qk_norm,
            tie_word_embeddings=names.model["lm_head"] not in tensors,
            sliding_windows=(window,) * num_layers if window else (),
        ),
        path,
    )


def _positions(fields: Fields, family: Family, head_dim: int, *, has_factors: bool) -> dict[str, Any]:
    """How queries and keys are told where they stand: the fields of Arch for ALiBi, or for RoPE."""
    if family.alibi_max_bias:
        return {"alibi_max_bias": fields.number("attention.max_alibi_bias", family.alibi_max_bias)}
    return {
        "rope_theta": fields.number("rope.freq_base", 10000.0, above=1.0),
        "rope_scaling": _rope_scaling(fields, has_factors),
        "rope_style": family.gguf_rope_style,
        "rotary_dim": fields.integer("rope.dimension_count", head_dim),
    }


def _uniform(value: Any) -> Any:
    """Some keys may be arrays with a value per layer; those that are all equal are one value."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        return value[0].item()
    return value


def _vocab_size(fields: Fields, metadata: Mapping[str, Any], tensors: Mapping[str, Described]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    if fields.has("vocab_size"):
        return fields.integer("vocab_size")
    embed = tensors.get(GGUF_NAMES.model["embed"])
    if embed is None or len(embed.shape) != 2:
        raise ModelFormatError("says nowhere how large its vocabulary is", path=fields.path)
    return embed.shape[0]


def _rope_scaling(fields: Fields, has_factors: bool) -> RopeScaling:
    # A factor without a type is linear, and a factor of 0 is none, as in llama.cpp.
    kind = fields.text("rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", 0.0, above=-1.0) or fields.number("rope.scale_linear", 1.0)
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    chosen = None if attention_factor == 1.0 else attention_factor
    if kind not in ("none", "linear", "yarn"):
        raise fields.error("rope.scaling.type", f"{kind[:40]!r} is not supported; supported: none, linear, yarn")
    if has_factors:
        if kind == "yarn" or (kind == "linear" and factor != 1.0):
            raise fields.error("rope.scaling.type", f"{kind} together with rope_freqs.weight is not supported")
        return RopeScaling(kind="factors", attention_factor=chosen)
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_context_length=fields.integer(
                "rope.scaling.original_context_length", fields.integer("context_length")
            ),
            beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
            # In a file the key multiplies what the method prescribes; in RopeScaling it replaces it.
            attention_factor=None if chosen is None else chosen * yarn_attention_factor(factor),
        )
    if kind == "linear" and factor != 1.0:
        return RopeScaling(kind="linear", factor=factor, attention_factor=chosen)
    return RopeScaling(attention_factor=chosen)
