"""From config.json and GGUF keys to `Arch`, and from tensor names to slots: what is read, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_files import CONFIG, GGUF_KEYS, hf_shapes

from gllm_driver.errors import ModelFormatError
from gllm_driver.models.arch import Arch, RopeScaling, tensor_slots
from gllm_driver.models.families import FAMILIES
from gllm_driver.models.gguf_keys import arch_of_gguf
from gllm_driver.models.hf_config import arch_of_config
from gllm_driver.models.names import BLOOM_NAMES, GGUF_FUSED_NAMES, GGUF_NAMES, HF_NAMES, MPT_NAMES, match_slots
from gllm_driver.types import F32, Q8_0, DType

PATH = Path("config.json")
HEAD = ["lm_head.weight"]


def hf(architecture: str = "LlamaForCausalLM", names: Any = HEAD, without: str = "", **changes: Any) -> Arch:
    config = {**CONFIG, "architectures": [architecture], **changes}
    return arch_of_config({key: value for key, value in config.items() if key != without}, names, PATH)


LLAMA = Arch(
    family="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_dim=16,
)


# -- config.json -----------------------------------------------------------------------------------------------------


def test_llama() -> None:
    assert hf() == LLAMA


def test_model_type_serves_where_architectures_is_absent() -> None:
    assert hf(without="architectures") == LLAMA
    assert hf(without="architectures", model_type="qwen3").family == "qwen3"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 32}, {"head_dim": 32, "rotary_dim": 32}),
        ({"head_dim": None}, {}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"attention_bias": True}, {"qkv_bias": True, "o_bias": True}),
        ({"mlp_bias": True}, {"mlp_bias": True}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"names": []}, {"tie_word_embeddings": True}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),
        ({"without": "rope_theta"}, {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"sliding_window": None, "layer_types": None}, {}),
        # Settings of relatives that are switched off, and keys that say nothing about the computation.
        ({"num_experts": 0, "logit_scale": 1.0, "quantization_config": None, "use_cache": True, "_name": "x"}, {}),
        # The newer spelling wins where the older is absent or null.
        (
            {"without": "rope_theta", "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
            {"rope_theta": 7e4},
        ),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 7e4}}, {"rope_theta": 7e4}),
        ({"rope_parameters": {"rope_theta": 7e4, "partial_rotary_factor": 0.25}}, {"rope_theta": 7e4, "rotary_dim": 4}),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7e4}}}, {"rope_theta": 7e4}),
    ],
)
def test_llama_options(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert hf(**changes) == replace(LLAMA, **expected)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"rope_type": "default"}, RopeScaling()),
        ({"type": "linear", "factor": 2}, RopeScaling("linear", 2.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("ntk", 2.0, original_context_length=256)),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 256),
        ),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 16},
            RopeScaling("yarn", 2.0, original_context_length=128, beta_fast=16.0),
        ),
        (
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64, "attention_factor": 1.5},
            RopeScaling("yarn", 4.0, original_context_length=64, attention_factor=1.5),
        ),
    ],
)
def test_rope_scaling(key: str, settings: dict[str, Any], scaling: RopeScaling) -> None:
    assert hf(**{key: settings}) == replace(LLAMA, rope_scaling=scaling)


def test_yarn_reaches_as_far_as_it_was_made_for() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert hf(rope_scaling=yarn).context_length == 1024


def test_original_length_at_the_top_level_wins() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert hf(rope_scaling=yarn, original_max_position_embeddings=64).rope_scaling.original_context_length == 64


def test_families_differ_as_their_classes_in_transformers_do() -> None:
    mistral = hf("MistralForCausalLM", without="num_key_value_heads", num_attention_heads=8)
    assert (mistral.num_kv_heads, mistral.sliding_windows) == (8, (4096, 4096))
    assert hf("MistralForCausalLM", sliding_window=None).sliding_windows == ()
    assert hf("MistralForCausalLM", sliding_window=7, attention_bias=True) == replace(
        LLAMA, family="mistral", sliding_windows=(7, 7)
    )
    qwen2 = hf("Qwen2ForCausalLM", sliding_window=7, attention_bias=False)
    assert qwen2 == replace(LLAMA, family="qwen2", qkv_bias=True)
    qwen3 = hf("Qwen3ForCausalLM", attention_bias=True)
    assert qwen3 == replace(
        LLAMA, family="qwen3", qkv_bias=True, o_bias=True, qk_norm=True, head_dim=128, rotary_dim=128
    )


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, ()),
        ({"use_sliding_window": True}, ()),  # max_window_layers is 28 where it is absent
        ({"use_sliding_window": True, "max_window_layers": 1}, (0, 7)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (7, 7)),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, ()),
        ({"use_sliding_window": False, "max_window_layers": 0}, ()),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}, (7, 0)),
        ({"layer_types": ["full_attention", "full_attention"]}, ()),
    ],
)
def test_sliding_windows_of_qwen(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert hf("Qwen3ForCausalLM", **{"sliding_window": 7, **changes}).sliding_windows == windows


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM' is not supported; supported: Llama"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification' is not supported"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "'LlamaForCausalLM, X' is not supported"),
        (
            {"architectures": None, "model_type": "gpt2"},
            "model_type 'gpt2' is not supported; supported: llama, mistral",
        ),
        ({"architectures": None, "model_type": None}, "no model_type is given"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu.*got 'relu'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.0}, "hidden_size must be a whole number in 1 … 2147483647, got '64.0'"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number in 1 … 16384"),
        ({"num_attention_heads": 0}, "num_attention_heads must be"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"head_dim": 15}, "rotary dimensions must be an even number in 2 … 15"),
        ({"partial_rotary_factor": 1.5}, "rotary dimensions must be an even number in 2 … 16.*got 24"),
        ({"partial_rotary_factor": 0.2}, "got 3"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number > 0"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number > 1"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"num_local_experts": 8}, "num_local_experts is 8: that changes the computation"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: that changes"),
        ({"logits_scaling": 8}, "logits_scaling is 8: that changes"),
        ({"is_causal": False}, "is_causal is False: that changes"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "'longrope' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, r"rope_scaling\.factor must be a number > 0"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "'mrope_section', which this version does not"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate is false"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor 4.0 must be below high_freq_factor 4.0",
        ),
    ],
)
def test_refused_settings(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem) as caught:
        hf(**changes)
    assert caught.value.path == PATH


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layer_types": ["full_attention"]}, "a list of 2 of full_attention, sliding_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "a list of 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window is not true"),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}},
            },
            "gives layers different rotary embeddings",
        ),
    ],
)
def test_refused_layer_settings(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem):
        hf("Qwen3ForCausalLM", **changes)


@pytest.mark.oracle
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.alibi_max_bias])
def test_absent_keys_take_the_defaults_of_transformers(family: str) -> None:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes = {
        key: CONFIG[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    }
    for given in (
        {"num_attention_heads": 32},
        {"num_attention_heads": 32, "use_sliding_window": True, "max_window_layers": 1},
    ):
        reference = transformers.AutoConfig.for_model(family, **sizes, **given)
        arch = arch_of_config({"model_type": family, **sizes, **given}, HEAD, PATH)
        assert arch.num_kv_heads == reference.num_key_value_heads
        assert arch.head_dim == (getattr(reference, "head_dim", None) or 64 // 32)
        assert arch.norm_eps == reference.rms_norm_eps
        assert arch.rope_theta == reference.rope_parameters["rope_theta"]
        assert arch.tie_word_embeddings == reference.tie_word_embeddings
        types = getattr(reference, "layer_types", None)
        if types is None:
            types = ["sliding_attention" if getattr(reference, "sliding_window", None) else "full_attention"] * 2
        windows = tuple(reference.sliding_window if kind == "sliding_attention" else 0 for kind in types)
        assert (arch.sliding_windows or (0, 0)) == windows


# -- ALiBi: MPT and BLOOM ---------------------------------------------------------------------------------------------

MPT_CONFIG: dict[str, Any] = {
    "architectures": ["MPTForCausalLM"],
    "model_type": "mpt",
    "d_model": 48,
    "n_heads": 6,
    "n_layers": 2,
    "expansion_ratio": 3,
    "max_seq_len": 256,
    "vocab_size": 96,
    "attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": None, "attn_type": "multihead_attention"},
}
MPT = Arch(
    family="mpt",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=144,
    num_layers=2,
    num_heads=6,
    num_kv_heads=6,
    head_dim=8,
    context_length=256,
    norm="layer",
    norm_eps=1e-5,
    alibi_max_bias=16.0,
    gated_mlp=False,
    activation="gelu",
    tie_word_embeddings=True,
)
BLOOM = replace(
    MPT,
    family="bloom",
    intermediate_size=192,
    norm_bias=True,
    embed_norm=True,
    alibi_max_bias=8.0,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    activation="gelu_tanh",
)


def mpt(names: Any = (), attn_config: Any = (), **changes: Any) -> Arch:
    settings = {**MPT_CONFIG["attn_config"], **dict(attn_config)}
    return arch_of_config({**MPT_CONFIG, "attn_config": settings, **changes}, names, PATH)


def test_mpt() -> None:
    assert mpt() == MPT
    assert mpt(attn_config={"alibi_bias_max": None}) == replace(MPT, alibi_max_bias=8.0)
    assert mpt(["transformer.blocks.0.attn.Wqkv.bias", "transformer.norm_f.bias"]) == replace(MPT, qkv_bias=True)
    assert mpt(["blocks.0.norm_1.bias", "blocks.0.ffn.down_proj.bias"]) == replace(MPT, norm_bias=True, mlp_bias=True)


def test_bloom_in_both_spellings() -> None:
    old = {"n_embed": 48, "num_attention_heads": 6, "n_layer": 2, "vocab_size": 96, "seq_length": 256}
    new = {"hidden_size": 48, "n_head": 6, "num_hidden_layers": 2, "vocab_size": 96, "seq_length": 256}
    for config in (old, new):
        assert arch_of_config({"architectures": ["BloomForCausalLM"], **config}, (), PATH) == BLOOM


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"attn_config": {"alibi": False}}, "attn_config.alibi is False: that changes the computation"),
        ({"attn_config": {"clip_qkv": 6.0}}, "attn_config.clip_qkv is 6.0"),
        ({"attn_config": {"qk_ln": True}}, "attn_config.qk_ln is True"),
        ({"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type is multiquery_attention"),
        ({"attn_config": {"softmax_scale": 0.1}}, "attn_config.softmax_scale is 0.1"),
        ({"attn_config": {"alibi_bias_max": 0}}, "attn_config.alibi_bias_max must be a number > 0"),
        ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale is inv_sqrt_d_model"),
        ({"d_model": 50}, "hidden size of 50 is no multiple of 6 attention heads"),
    ],
)
def test_refused_mpt_settings(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem):
        mpt(**changes)


def test_refused_bloom_settings() -> None:
    config = {"architectures": ["BloomForCausalLM"], "n_embed": 48, "apply_residual_connection_post_layernorm": True}
    with pytest.raises(ModelFormatError, match="apply_residual_connection_post_layernorm is True"):
        arch_of_config(config, (), PATH)


@pytest.mark.oracle
def test_absent_keys_of_alibi_families_take_the_defaults_of_transformers() -> None:
    import transformers

    for family in (name for name, family in FAMILIES.items() if family.alibi_max_bias):
        reference = transformers.AutoConfig.for_model(family)
        arch = arch_of_config({"model_type": family}, (), PATH)
        assert (arch.hidden_size, arch.num_heads) == (reference.hidden_size, reference.num_attention_heads)
        assert (arch.num_layers, arch.vocab_size) == (reference.num_hidden_layers, reference.vocab_size)
        assert arch.norm_eps == reference.layer_norm_epsilon
        assert arch.tie_word_embeddings == reference.tie_word_embeddings


# -- GGUF keys -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, ...]
    dtype: DType | None = F32
    path: Path = Path("m.gguf")


def gguf(architecture: str = "llama", tensors: Any = ("output.weight",), **changes: Any) -> Arch:
    keys = {key.replace("llama.", f"{architecture}."): value for key, value in GGUF_KEYS.items()}
    keys["general.architecture"] = architecture
    for key, value in changes.items():
        name = key.replace("__", ".")
        keys[name if name.startswith(("tokenizer", "general")) else f"{architecture}.{name}"] = value
    return arch_of_gguf(keys, {name: Stored((96, 64)) for name in tensors}, Path("m.gguf"))


GGUF_LLAMA = replace(LLAMA, rope_style="interleaved")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"architecture": "qwen2"}, {"family": "qwen2", "rope_style": "neox"}),
        ({"architecture": "qwen3"}, {"family": "qwen3", "rope_style": "neox", "qk_norm": True}),
        ({"attention__key_length": 32, "attention__value_length": 32}, {"head_dim": 32, "rotary_dim": 32}),
        ({"rope__dimension_count": 8}, {"rotary_dim": 8}),
        ({"rope__freq_base": 5e5}, {"rope_theta": 5e5}),
        ({"attention__head_count_kv": None}, {"num_kv_heads": 4}),
        ({"attention__head_count_kv": np.array([2, 2], np.int32)}, {"num_kv_heads": 2}),
        ({"attention__sliding_window": 7}, {"sliding_windows": (7, 7)}),
        ({"attention__sliding_window": 0}, {}),
        ({"tensors": ()}, {"tie_word_embeddings": True}),
        ({"tensors": ("output.weight", "blk.0.attn_q.bias")}, {"qkv_bias": True}),
        ({"tensors": ("output.weight", "blk.0.attn_output.bias")}, {"o_bias": True}),
        ({"tensors": ("output.weight", "blk.0.ffn_down.bias")}, {"mlp_bias": True}),
        ({"tensors": ("output.weight", "rope_freqs.weight")}, {"rope_scaling": RopeScaling("factors")}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope__scaling__factor": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        ({"rope__scaling__factor": 0.0}, {}),
        ({"rope__scale_linear": 4.0}, {"rope_scaling": RopeScaling("linear", 4.0)}),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 64},
            {"rope_scaling": RopeScaling("yarn", 4.0, original_context_length=64)},
        ),
        (
            {"rope__scaling__type": "yarn", "rope__scaling__factor": 1.0, "rope__scaling__attn_factor": 0.5},
            {"rope_scaling": RopeScaling("yarn", 1.0, original_context_length=256, attention_factor=0.5)},
        ),
        ({"vocab_size": 12}, {}),
        ({"vocab_size": 12, "tokenizer__ggml__tokens": None}, {"vocab_size": 12}),
        ({"tensors": ("token_embd.weight", "output.weight"), "tokenizer__ggml__tokens": None}, {}),
        ({"expert_count": 0, "rope__scaling__finetuned": True, "attention__causal": True}, {}),
    ],
)
def test_gguf_keys(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert gguf(**changes) == replace(GGUF_LLAMA, **expected)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "gemma"}, "general.architecture 'gemma' is not supported; supported: llama, qwen2, qwen3"),
        ({"general__architecture": None}, "no general.architecture is given"),
        ({"embedding_length": None}, "llama.embedding_length is missing"),
        ({"block_count": 0}, "llama.block_count must be a whole number in 1 … 16384"),
        ({"attention__layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
        ({"attention__head_count": np.array([4, 2], np.int32)}, "llama.attention.head_count must be a whole number"),
        ({"attention__value_length": 8}, "llama.attention.value_length must be 16, the length of keys"),
        ({"expert_count": 8}, "llama.expert_count is 8: that changes the computation"),
        ({"attention__causal": False}, "llama.attention.causal is False"),
        ({"attention__invented_later": 2}, "llama.attention.invented_later is 2: that changes"),
        ({"rope__scaling__type": "longrope"}, "'longrope' is not supported; supported: none, linear, yarn"),
        ({"rope__scaling__yarn_ext_factor": 0.0}, "yarn_ext_factor is 0.0"),
        ({"rope__scaling__factor": 2.0, "tensors": ("rope_freqs.weight",)}, "together with rope_freqs.weight"),
        ({"tokenizer__ggml__tokens": None}, "says nowhere how large its vocabulary is"),
    ],
)
def test_refused_gguf_keys(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem) as caught:
        gguf(**changes)
    assert caught.value.path == Path("m.gguf")


# -- tensor names ----------------------------------------------------------------------------------------------------

FULL = replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, rope_scaling=RopeScaling("factors"))


def test_every_slot_has_a_name_of_its_own_in_both_conventions() -> None:
    for table, arch in ((HF_NAMES, replace(FULL, rope_scaling=RopeScaling())), (GGUF_NAMES, FULL)):
        names = [table.of(slot) for slot in tensor_slots(arch)]
        assert len(set(names)) == len(names)
        stored = {table.of(slot): Stored(shape) for slot, shape in tensor_slots(arch).items()}
        assert match_slots(arch, table, stored, PATH) == dict(zip(tensor_slots(arch), names, strict=True))


def test_names_are_those_of_the_gguf_package() -> None:
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.QWEN3, 2)
    for slot in tensor_slots(replace(FULL, rope_scaling=RopeScaling())):
        stem, suffix = HF_NAMES.of(slot).rsplit(".", 1)
        assert f"{known.get_name(stem)}.{suffix}" == GGUF_NAMES.of(slot)


@pytest.mark.parametrize("table", [MPT_NAMES, BLOOM_NAMES, GGUF_FUSED_NAMES], ids=lambda table: table.convention)
@pytest.mark.parametrize("has_prefix", [True, False])
def test_queries_keys_and_values_share_a_tensor(table: Any, has_prefix: bool) -> None:
    arch = MPT if table is MPT_NAMES else BLOOM
    names = {slot: table.of(slot) for slot in tensor_slots(arch)}
    if not has_prefix:
        names = {slot: name.removeprefix(table.prefix) for slot, name in names.items()}
    stored: dict[str, Stored] = {}
    for slot, (rows, *rest) in tensor_slots(arch).items():
        before = stored[names[slot]].shape[0] if names[slot] in stored else 0
        stored[names[slot]] = Stored((before + rows, *rest))
    fused = [name for name, tensor in stored.items() if tensor.shape[0] == 3 * 48]
    assert len(fused) == arch.num_layers * (2 if arch.qkv_bias else 1) + (table is MPT_NAMES) * 2  # and ffn.up_proj
    assert match_slots(arch, table.fitting(stored), stored, PATH) == names
    stored[names["layers.1.k"]] = Stored((2 * 48, 48))
    with pytest.raises(ModelFormatError, match=r"has shape \[96, 48\], expected \[144, 48\]"):
        match_slots(arch, table.fitting(stored), stored, PATH)


def stored_hf(**changes: Any) -> dict[str, Stored]:
    stored = {name: Stored(shape) for name, shape in hf_shapes().items()}
    for name, value in changes.items():
        stored.pop(name, None)
        if value is not None:
            stored[name] = value
    return stored


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.masked_bias",
    ],
)
def test_harmless_extras_are_tolerated(extra: str) -> None:
    match_slots(LLAMA, HF_NAMES, stored_hf(**{extra: Stored((8,))}), PATH)


def test_a_copy_of_tied_embeddings_is_tolerated() -> None:
    sources = match_slots(replace(LLAMA, tie_word_embeddings=True), HF_NAMES, stored_hf(), PATH)
    assert "lm_head" not in sources


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.norm.weight": None}, r"tensor 'model.norm.weight': is missing.*shape \[64\]"),
        ({"model.norm.weight": Stored((65,))}, r"'model.norm.weight': has shape \[65\], expected \[64\]"),
        ({"model.embed_tokens.weight": Stored((64, 96))}, r"has shape \[64, 96\], expected \[96, 64\]"),
        ({"model.norm.weight": Stored((64,), Q8_0)}, "has type q8_0, but norms and biases must be f32, f16, bf16"),
        ({"model.layers.0.self_attn.q_proj.bias": Stored((64,))}, "q_proj.bias': has no place in a llama model"),
        ({"model.layers.2.mlp.up_proj.weight": Stored((1,))}, r"says 2 layers, .* of 3 \(0 … 2\)"),
        ({"model.layers.9.mlp.up_proj.weight": Stored((1,))}, r"says 2 layers, .* of 3 \(0 … 9\)"),
        ({name: None for name in hf_shapes() if "layers.1" in name}, r"says 2 layers, .* of 1 \(0 … 0\)"),
        ({name: None for name in hf_shapes() if "layers." in name}, "says 2 layers, .* of none"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFormatError, match=problem):
        match_slots(LLAMA, HF_NAMES, stored_hf(**changes), PATH)


def test_a_claim_of_many_layers_costs_nothing() -> None:
    with pytest.raises(ModelFormatError, match="says 1000000000000 layers"):
        match_slots(replace(LLAMA, num_layers=10**12), HF_NAMES, stored_hf(), PATH)
