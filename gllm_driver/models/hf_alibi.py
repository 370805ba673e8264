"""config.json of the families with ALiBi, whose keys are their own: MPT and BLOOM.

The reference is the configuration class of each in transformers; `alibi_bias_max`, which that class leaves unread,
means what it means in MPT's own code.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .arch import Arch
from .families import Family
from .fields import MAX_LAYERS, Fields

_ATTN_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_type": ("multihead_attention",),
    "clip_qkv": (),
    "softmax_scale": (),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "qk_gn": (False,),
    "alibi": (True,),
    "rope": (False,),
    "sliding_window_size": (-1,),
    "attn_logit_softcapping": (),
}
_MPT_NEUTRAL: dict[str, tuple[Any, ...]] = {"logit_scale": (), "norm_type": ("low_precision_layernorm", "layernorm")}
_BLOOM_NEUTRAL: dict[str, tuple[Any, ...]] = {"apply_residual_connection_post_layernorm": (False,)}


def arch_of_mpt(fields: Fields, family: Family, tensor_names: Collection[str]) -> Arch:
    """MPT (MosaicML 2023). Biases are seen from the tensors, as the files alone say which there are."""
    fields.refuse(_MPT_NEUTRAL)
    settings = fields.values.get("attn_config") or {}
    if not isinstance(settings, dict):
        raise fields.wrong("attn_config", "an object")
    attention = Fields(settings, fields.path, prefix="attn_config.")
    attention.refuse(_ATTN_NEUTRAL)
    names = family.hf_names.fitting(tensor_names)

    def has(slot: str) -> bool:
        return names.of(f"layers.0.{slot}") in tensor_names

    hidden_size = fields.integer("d_model", 2048)
    num_heads = fields.integer("n_heads", 16)
    return Arch(
        vocab_size=fields.integer("vocab_size", 50368),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("expansion_ratio", 4) * hidden_size,
        num_layers=fields.integer("n_layers", 24, high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=attention.integer("kv_n_heads", num_heads),
        context_length=fields.integer("max_seq_len", 2048),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_bias=has("attn_norm_bias"),
        alibi_max_bias=attention.number("alibi_bias_max", family.alibi_max_bias),
        qkv_bias=has("q_bias"),
        o_bias=has("o_bias"),
        mlp_bias=has("down_bias"),
        **_common(family, hidden_size, num_heads, fields, tensor_names),
    )


def arch_of_bloom(fields: Fields, family: Family, tensor_names: Collection[str]) -> Arch:
    """BLOOM (BigScience 2022): every linear layer and norm has a bias. Older files write n_embed and other aliases."""
    fields.refuse(_BLOOM_NEUTRAL)

    def either(first: str, second: str, default: int, **limits: int) -> int:
        return fields.integer(first if fields.has(first) else second, default, **limits)

    hidden_size = either("n_embed", "hidden_size", 64)
    num_heads = either("n_head", "num_attention_heads", 8)
    return Arch(
        vocab_size=fields.integer("vocab_size", 250880),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=either("n_layer", "num_hidden_layers", 2, high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        context_length=fields.integer("seq_length", 2048),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        alibi_max_bias=family.alibi_max_bias,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        **_common(family, hidden_size, num_heads, fields, tensor_names),
    )


def _common(
    family: Family, hidden_size: int, num_heads: int, fields: Fields, tensor_names: Collection[str]
) -> dict[str, Any]:
    """What both say in the same way, or not at all."""
    return {
        "family": family.name,
        "head_dim": max(hidden_size // num_heads, 1),
        "norm": family.norm,
        "embed_norm": family.embed_norm,
        "gated_mlp": family.gated_mlp,
        "activation": family.activation,
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True) or "lm_head.weight" not in tensor_names,
    }
