"""The model families this version runs: one row each. A new model of the same shape is one more row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelFormatError
from .arch import Activation, Arch, Norm, RopeStyle
from .fields import MAX_SIZE
from .names import BLOOM_NAMES, GGUF_FUSED_NAMES, GGUF_NAMES, HF_NAMES, MPT_NAMES, NameTable

Bias = Literal["never", "always", "attention_bias", "mlp_bias"]  # the last two: what that key of config.json says


@dataclass(frozen=True)
class Family:
    """How a family's files are to be understood. Defaults and rules are those of its class in transformers."""

    name: str
    architectures: tuple[str, ...]  # config.json `architectures`
    model_types: tuple[str, ...]  # config.json `model_type`
    gguf_architectures: tuple[str, ...] = ()  # GGUF `general.architecture`
    hf_names: NameTable = HF_NAMES
    gguf_names: NameTable = GGUF_NAMES
    gguf_rope_style: RopeStyle = "neox"
    alibi_max_bias: float = 0.0  # not 0: ALiBi in place of RoPE, with this figure where no key says another
    norm: Norm = "rms"
    embed_norm: bool = False
    gated_mlp: bool = True
    activation: Activation | None = None  # None: what `hidden_act` says
    qkv_bias: Bias = "never"
    o_bias: Bias = "never"
    mlp_bias: Bias = "never"
    qk_norm: bool = False
    # Which layers see a window. all: every one, when sliding_window is set. layer_types: those that this key names, or
    # those from max_window_layers on; and none unless use_sliding_window.
    window: Literal["none", "all", "layer_types"] = "none"
    config_defaults: Mapping[str, Any] = field(default_factory=dict)  # for keys that config.json leaves out


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "LlamaForSequenceClassification"),
            model_types=("llama",),
            gguf_architectures=("llama",),
            gguf_rope_style="interleaved",  # llama.cpp's converter reorders the rows of Q and K for it
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        Family(
            name="mistral",
            architectures=("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification"),
            model_types=("mistral",),
            window="all",
            config_defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
        Family(
            name="qwen2",
            architectures=("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification"),
            model_types=("qwen2",),
            gguf_architectures=("qwen2",),
            qkv_bias="always",
            window="layer_types",
            config_defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        ),
        Family(
            name="qwen3",
            architectures=("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"),
            model_types=("qwen3",),
            gguf_architectures=("qwen3",),
            qkv_bias="attention_bias",
            o_bias="attention_bias",
            qk_norm=True,
            window="layer_types",
            config_defaults={"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        ),
        Family(
            name="mpt",
            architectures=("MptForCausalLM", "MPTForCausalLM"),
            model_types=("mpt",),
            gguf_architectures=("mpt",),
            hf_names=MPT_NAMES,
            gguf_names=GGUF_FUSED_NAMES,
            alibi_max_bias=8.0,
            norm="layer",
            gated_mlp=False,
            activation="gelu",
        ),
        Family(
            name="bloom",
            architectures=("BloomForCausalLM", "BloomModel"),
            model_types=("bloom",),
            gguf_architectures=("bloom",),
            hf_names=BLOOM_NAMES,
            gguf_names=GGUF_FUSED_NAMES,
            alibi_max_bias=8.0,
            norm="layer",
            embed_norm=True,
            gated_mlp=False,
            activation="gelu_tanh",
        ),
    )
}


def family_of_config(config: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is absent."""
    architectures = config.get("architectures")
    if architectures:
        known = {name: family for family in FAMILIES.values() for name in family.architectures}
        names = architectures if isinstance(architectures, list) else [architectures]
        if len(names) == 1 and isinstance(names[0], str) and names[0] in known:
            return known[names[0]]
        raise _unknown("architecture", ", ".join(map(str, names)), known, path)
    known = {name: family for family in FAMILIES.values() for name in family.model_types}
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    raise _unknown("model_type", model_type, known, path)


def family_of_gguf(architecture: Any, path: Path) -> Family:
    """The family of a GGUF file, by `general.architecture`."""
    known = {name: family for family in FAMILIES.values() for name in family.gguf_architectures}
    if isinstance(architecture, str) and architecture in known:
        return known[architecture]
    raise _unknown("general.architecture", architecture, known, path)


def _unknown(key: str, value: Any, known: Mapping[str, Family], path: Path) -> ModelFormatError:
    if value is None:
        return ModelFormatError(f"no {key} is given; supported: {', '.join(known)}", path=path)
    return ModelFormatError(f"{key} {str(value)[:80]!r} is not supported; supported: {', '.join(known)}", path=path)


def checked(arch: Arch, path: Path) -> Arch:
    """`arch` itself, once its numbers fit each other."""

    def require(ok: bool, problem: str) -> None:
        if not ok:
            raise ModelFormatError(problem, path=path)

    require(
        arch.num_heads % arch.num_kv_heads == 0,
        f"{arch.num_heads} attention heads are no multiple of {arch.num_kv_heads} key/value heads",
    )
    require(
        arch.hidden_size % arch.num_heads == 0 or not arch.alibi_max_bias,
        f"a hidden size of {arch.hidden_size} is no multiple of {arch.num_heads} attention heads",
    )
    require(
        arch.alibi_max_bias > 0 or (arch.rotary_dim % 2 == 0 and 2 <= arch.rotary_dim <= arch.head_dim),
        f"the rotary dimensions must be an even number in 2 … {arch.head_dim} (a head), got {arch.rotary_dim}",
    )
    require(arch.context_length <= MAX_SIZE, f"a context of {arch.context_length} tokens is more than {MAX_SIZE}")
    scaling = arch.rope_scaling
    if scaling.kind in ("llama3", "yarn"):
        require(scaling.original_context_length > 0, f"RoPE scaling {scaling.kind} needs the original context length")
    if scaling.kind == "llama3":
        require(
            scaling.low_freq_factor < scaling.high_freq_factor,
            f"RoPE low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor {scaling.high_freq_factor}",
        )
    if scaling.kind == "ntk":
        require(arch.rotary_dim > 2, "RoPE scaling ntk needs more than 2 rotary dimensions")
    return arch
