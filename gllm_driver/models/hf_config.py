"""Hugging Face's config.json → `Arch`, in the older spelling (rope_scaling) and the newer (rope_parameters).

The reference for what each key means, and for the value of an absent one, is the configuration class in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from .arch import Activation, Arch, RopeScaling
from .families import Bias, Family, checked, family_of_config
from .fields import MAX_LAYERS, Fields
from .hf_alibi import arch_of_bloom, arch_of_mpt
from .rope import yarn_attention_factor

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_ZERO = (0, 0.0, False)
_ONE = (1, 1.0)
# Keys of related models that change the computation, with the values that leave it as we do it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": _ZERO,
    "attn_logit_softcapping": _ZERO,
    "final_logit_softcapping": _ZERO,
    "clip_qkv": _ZERO,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "embedding_multiplier": _ONE,
    "residual_multiplier": _ONE,
    "attention_multiplier": (),
    "scale_emb": _ONE,
    "scale_depth": (),
    "use_parallel_residual": _ZERO,
    "parallel_attn": _ZERO,
    "num_experts": _ZERO,
    "num_local_experts": _ZERO,
    "n_routed_experts": _ZERO,
    "attention_chunk_size": _ZERO,
    "no_rope_layers": ([],),
    "no_rope_layer_interval": _ZERO,
    "use_qk_norm": _ZERO,
    "qk_layernorm": _ZERO,
    "is_causal": (True,),
    "use_bidirectional_attention": _ZERO,
    "is_encoder_decoder": _ZERO,
    "add_cross_attention": _ZERO,
    "position_embedding_type": ("rope", "rotary", "absolute"),  # "absolute" is an old default nobody reads
}

_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    *("truncate", "finetuned"),
}
Reader = Callable[[Fields, Family, Collection[str]], Arch]
_READERS: dict[str, Reader] = {"mpt": arch_of_mpt, "bloom": arch_of_bloom}  # families with keys of their own
_LAYER_TYPES = ("full_attention", "sliding_attention")


def arch_of_config(config: Mapping[str, Any], tensor_names: Collection[str], path: Path) -> Arch:
    """The description in `config`, the object config.json at `path` holds.

    `tensor_names` are the names in the weight files: where there is no lm_head.weight the embeddings are tied.

    Raises ModelFormatError for an unknown architecture, a missing or impossible value, and any setting that would
    change the computation in a way this version does not implement.
    """
    family = family_of_config(config, path)
    fields = Fields({**family.config_defaults, **config}, path)
    fields.refuse(_NEUTRAL)
    read = _READERS.get(family.name, _arch_of_llama)
    return checked(read(fields, family, tensor_names), path)


def _arch_of_llama(fields: Fields, family: Family, tensor_names: Collection[str]) -> Arch:
    """Llama's keys, which most families have taken over."""
    hidden_act = fields.text("hidden_act", "silu")
    if hidden_act not in ACTIVATIONS:
        raise fields.wrong("hidden_act", f"one of {', '.join(ACTIVATIONS)}")

    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", max(hidden_size // num_heads, 1), high=65536)
    layer_types = _layer_types(fields, family, num_layers)
    rope = _rope_fields(fields, layer_types)
    scaling = _rope_scaling(fields, rope)
    context_length = fields.integer("max_position_embeddings")
    if scaling.kind == "yarn":  # made for factor × original positions, whatever max_position_embeddings was left at
        context_length = max(context_length, round(scaling.factor * scaling.original_context_length))

    def has_bias(rule: Bias) -> bool:
        return rule == "always" or (rule != "never" and fields.flag(rule, False))

    return Arch(
        family=family.name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        # Only an absent key takes the family's default; null means as many as query heads.
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        context_length=context_length,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", 10000.0, above=1.0),
        rope_scaling=scaling,
        rope_style="neox",
        rotary_dim=int(head_dim * rope.number("partial_rotary_factor", 1.0)),
        qkv_bias=has_bias(family.qkv_bias),
        o_bias=has_bias(family.o_bias),
        mlp_bias=has_bias(family.mlp_bias),
        qk_norm=family.qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False) or "lm_head.weight" not in tensor_names,
        activation=ACTIVATIONS[hidden_act],
        sliding_windows=_sliding_windows(fields, layer_types),
        num_labels=_num_labels(fields) if "score.weight" in tensor_names else 0,
    )


def _num_labels(fields: Fields) -> int:
    """Labels of a model for classification: transformers writes their names, or means two."""
    labels = fields.values.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else fields.integer("num_labels", 2)


def _layer_types(fields: Fields, family: Family, num_layers: int) -> list[str]:
    """`full_attention` or `sliding_attention` for every layer."""
    if family.window == "none":
        return ["full_attention"] * num_layers
    if family.window == "all":
        return ["sliding_attention" if fields.has("sliding_window") else "full_attention"] * num_layers
    if fields.has("layer_types"):
        types = fields.values["layer_types"]
        if not isinstance(types, list) or len(types) != num_layers or not all(t in _LAYER_TYPES for t in types):
            raise fields.wrong("layer_types", f"a list of {num_layers} of {', '.join(_LAYER_TYPES)}")
        if "sliding_attention" in types and not fields.flag("use_sliding_window", False):
            raise fields.error("layer_types", "has sliding_attention, but use_sliding_window is not true")
        return types
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return ["full_attention"] * num_layers
    first = fields.integer("max_window_layers", 28, low=0)
    return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]


def _sliding_windows(fields: Fields, layer_types: list[str]) -> tuple[int, ...]:
    if "sliding_attention" not in layer_types:
        return ()
    window = fields.integer("sliding_window")
    return tuple(window if layer_type == "sliding_attention" else 0 for layer_type in layer_types)


def _rope_fields(fields: Fields, layer_types: list[str]) -> Fields:
    """The RoPE settings of all layers, with rope_theta and partial_rotary_factor from the top level where absent."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    settings = fields.values.get(key) or {}
    if not isinstance(settings, dict):
        raise fields.wrong(key, "an object")
    if nested := [name for name in settings if name in _LAYER_TYPES]:
        used = [settings.get(name) for name in sorted(set(layer_types))]
        if len(nested) != len(settings) or not all(isinstance(s, dict) and s == used[0] for s in used):
            raise fields.error(key, "gives layers different rotary embeddings, which is not supported yet")
        settings = used[0] or {}
    if unknown := sorted(settings.keys() - _ROPE_KEYS):
        raise fields.error(key, f"has {', '.join(map(repr, unknown))[:80]}, which this version does not know")
    inherited = {name: fields.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return Fields({**inherited, **settings}, fields.path, prefix=f"{key}.")


def _rope_scaling(fields: Fields, rope: Fields) -> RopeScaling:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in _SCALINGS:
        raise rope.error("rope_type", f"{kind[:40]!r} is not supported; supported: {', '.join(_SCALINGS)}")
    return _SCALINGS[kind](fields, rope)


def _original_context_length(fields: Fields, rope: Fields) -> int:
    if fields.has("original_max_position_embeddings"):
        return fields.integer("original_max_position_embeddings")
    return rope.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))


def _yarn(fields: Fields, rope: Fields) -> RopeScaling:
    original = _original_context_length(fields, rope)
    if not rope.flag("truncate", True):
        raise rope.error("truncate", "is false: that changes the computation and is not supported yet")
    factor = rope.number("factor", fields.integer("max_position_embeddings") / original)
    attention_factor = None
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        mscale, mscale_all_dim = rope.number("mscale"), rope.number("mscale_all_dim")
        attention_factor = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, mscale_all_dim)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=attention_factor,
    )


def _llama3(fields: Fields, rope: Fields) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context_length=_original_context_length(fields, rope),
    )


def _dynamic(fields: Fields, rope: Fields) -> RopeScaling:
    original = fields.integer("max_position_embeddings")
    return RopeScaling(kind="ntk", factor=rope.number("factor"), original_context_length=original)


_SCALINGS = {
    "default": lambda fields, rope: RopeScaling(),
    "linear": lambda fields, rope: RopeScaling(kind="linear", factor=rope.number("factor")),
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
