"""Tiny random models of every supported family and option, one row each, written as Hugging Face directories.

The weights come from Philox counters and IEEE arithmetic alone, keyed by (seed, tensor name): any machine with numpy
builds the same bytes, so golden files need hold results only, and adding a tensor changes no other tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from . import alibi_models

Config = dict[str, Any]
Weights = dict[str, np.ndarray]

_NUMPY_DTYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
_SAFETENSORS_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TORCH_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

# What files of these families carry besides sizes. None of it may change a result where it is switched off.
_FAMILIES: dict[str, Config] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    # Published Qwen files name a window and switch it off: a reader that takes the number alone goes wrong.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 8,
        "use_sliding_window": False,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 2,
    },
}


@dataclass(frozen=True)
class Row:
    """One tiny model. `sizes` is (vocab, hidden, ffn, layers, heads, kv heads)."""

    name: str
    family: Literal["llama", "mistral", "qwen2", "qwen3", "mpt", "bloom"]
    seed: int
    sizes: tuple[int, int, int, int, int, int]
    rope: Config = field(default_factory=dict)  # rope_theta, and the scaling's own keys
    convention: Literal["flat", "nested"] = (
        "flat"  # rope_theta + rope_scaling + torch_dtype, or rope_parameters + dtype
    )
    dtype: Literal["f32", "f16", "bf16"] = "f32"  # of the stored weights
    extra: Config = field(default_factory=dict)  # further config.json entries; the value _ABSENT removes one
    num_shards: int = 1
    gguf: bool = True  # GGUF has an agreed way to say this
    llama_cpp: bool = True  # llama.cpp computes this from the GGUF


_ABSENT = object()

# vocab, hidden, ffn, layers, heads, kv heads
_SMALL = (256, 64, 176, 2, 4, 2)
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ROWS: tuple[Row, ...] = (
    # -- Llama 2: as many KV heads as heads; its oldest files name neither num_key_value_heads nor rope_theta
    Row(
        "llama2_mha",
        "llama",
        72,
        (256, 64, 176, 2, 4, 4),
        extra={"num_key_value_heads": _ABSENT, "rms_norm_eps": 1e-5, "tie_word_embeddings": _ABSENT},
    ),
    Row("llama3_gqa", "llama", 220, (288, 64, 160, 3, 8, 2), {"rope_theta": 500000.0}, dtype="bf16"),
    # -- Llama 3.1: with 64 original positions, wavelengths of a 32-wide head fall on both sides and into the band
    Row(
        "llama31_nested",
        "llama",
        185,
        (256, 64, 160, 2, 2, 1),
        {"rope_theta": 10000.0, **_LLAMA3, "original_max_position_embeddings": 64},
        convention="nested",
    ),
    Row(
        "llama32_tied",
        "llama",
        58,
        (256, 64, 160, 3, 2, 2),
        {"rope_theta": 500000.0, **_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64},
        dtype="bf16",
        extra={"tie_word_embeddings": True},
    ),
    Row("rope_linear", "llama", 61, _SMALL, {"rope_theta": 10000.0, "type": "linear", "factor": 4.0}),
    Row(
        "rope_linear_nested",
        "llama",
        151,
        _SMALL,
        {"rope_theta": 20000.0, "rope_type": "linear", "factor": 2.5},
        convention="nested",
    ),
    Row(
        "rope_yarn",
        "qwen2",
        31,
        (256, 64, 160, 2, 2, 2),
        {"rope_theta": 10000.0, "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        extra={"max_position_embeddings": 1024},
    ),
    Row(
        "rope_yarn_explicit",
        "llama",
        107,
        (256, 64, 160, 2, 2, 1),
        {
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.3,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        convention="nested",
        extra={"max_position_embeddings": 4096},
        llama_cpp=False,  # it takes the betas from its caller, not from the file
    ),
    # -- Dynamic NTK leaves all as it is up to max_position_embeddings; only beyond would the base grow
    Row("rope_dynamic", "llama", 23, _SMALL, {"rope_theta": 10000.0, "type": "dynamic", "factor": 4.0}),
    Row("qwen2_bias", "qwen2", 34, _SMALL, {"rope_theta": 1000000.0}),
    Row(
        "qwen25_tied",
        "qwen2",
        457,
        (320, 48, 128, 3, 6, 2),
        {"rope_theta": 1000000.0},
        dtype="bf16",
        extra={"tie_word_embeddings": True},
    ),
    Row(
        "qwen2_windows",
        "qwen2",
        12,
        (256, 64, 160, 3, 4, 2),
        {"rope_theta": 10000.0},
        extra={"use_sliding_window": True, "sliding_window": 12},
        gguf=False,  # no GGUF key for a window on the upper layers of this family
        llama_cpp=False,
    ),
    # -- Qwen3: norms on each query and key head; heads wider than hidden / heads
    Row(
        "qwen3_tied",
        "qwen3",
        369,
        (320, 64, 192, 3, 4, 2),
        {"rope_type": "default", "rope_theta": 1000000.0},
        convention="nested",
        dtype="bf16",
        extra={"head_dim": 32, "tie_word_embeddings": True},
    ),
    Row(
        "qwen3_layer_types",
        "qwen3",
        108,
        (256, 64, 160, 3, 4, 2),
        {"rope_type": "default", "rope_theta": 10000.0},
        convention="nested",
        extra={
            "head_dim": 24,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        gguf=False,
        llama_cpp=False,
    ),
    Row("qwen3_flat", "qwen3", 196, (256, 96, 160, 2, 6, 3), {"rope_theta": 1000000.0}, extra={"head_dim": 32}),
    Row(
        "mistral_window",
        "mistral",
        32,
        (256, 64, 176, 3, 4, 2),
        {"rope_theta": 10000.0},
        extra={"sliding_window": 16},
        llama_cpp=False,  # its `llama` architecture attends to everything
    ),
    Row(
        "mistral_wide_heads",
        "mistral",
        152,
        (256, 64, 160, 2, 4, 2),
        {"rope_type": "default", "rope_theta": 1000000.0},
        convention="nested",
        dtype="f16",
        extra={"head_dim": 24, "sliding_window": None},
        num_shards=3,
    ),
    Row("llama_bias", "llama", 519, _SMALL, {"rope_theta": 10000.0}, extra={"attention_bias": True, "mlp_bias": True}),
    Row("mqa", "llama", 15, (256, 64, 160, 2, 4, 1), {"rope_theta": 10000.0}, extra={"rms_norm_eps": 0.01}),
    # -- Sizes that are multiples of nothing: vector tails and ragged blocks
    Row("odd_llama", "llama", 36, (251, 72, 100, 2, 3, 3), extra={"rms_norm_eps": 1e-5}),
    Row("odd_qwen3", "qwen3", 65, (199, 42, 53, 2, 5, 1), {"rope_theta": 10000.0}, extra={"head_dim": 18}),
    # -- SmolLM: Llama with three heads on one KV head, tied; stored in half precision, in two shards
    Row(
        "smollm_tied",
        "llama",
        34,
        (384, 48, 128, 3, 3, 1),
        {"rope_theta": 10000.0},
        dtype="f16",
        extra={"tie_word_embeddings": True},
        num_shards=2,
    ),
    # -- ALiBi: head counts that are a power of two, and that are none. llama.cpp reads its GELU from a table of f16.
    Row("mpt", "mpt", 165, (256, 64, 256, 2, 4, 4), llama_cpp=False),
    Row("mpt_six_heads", "mpt", 16, (288, 96, 384, 3, 6, 6), dtype="bf16", llama_cpp=False),
    Row("bloom", "bloom", 365, (256, 64, 256, 2, 4, 4), llama_cpp=False),
    Row("bloom_twelve_heads", "bloom", 513, (320, 96, 384, 2, 12, 12), dtype="f16", num_shards=2, llama_cpp=False),
)

BY_NAME = {row.name: row for row in ROWS}

PROMPT_LENGTH = 40  # longer than every sliding window above
NUM_GREEDY = 16


def config(row: Row) -> Config:
    """The row's config.json, with the keys in the convention the row asks for."""
    vocab, hidden, ffn, layers, heads, kv_heads = row.sizes
    if row.family in alibi_models.FAMILIES:
        return {**alibi_models.config(row.family, row.sizes), "torch_dtype": _TORCH_NAMES[row.dtype], **row.extra}
    out: Config = {
        **_FAMILIES[row.family],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if row.convention == "nested":
        out |= {"dtype": _TORCH_NAMES[row.dtype], "rope_parameters": dict(row.rope), "transformers_version": "5.0.0"}
    else:
        scaling = {key: value for key, value in row.rope.items() if key != "rope_theta"}
        out |= {"torch_dtype": _TORCH_NAMES[row.dtype], "rope_scaling": scaling or None}
        out |= {"transformers_version": "4.51.0"}
        if "rope_theta" in row.rope:
            out["rope_theta"] = row.rope["rope_theta"]
    out |= row.extra
    return {key: value for key, value in out.items() if value is not _ABSENT}


def _tensor_shapes(row: Row) -> dict[str, tuple[int, ...]]:
    if row.family in alibi_models.FAMILIES:
        return alibi_models.tensor_shapes(row.family, row.sizes)
    vocab, hidden, ffn, layers, heads, kv_heads = row.sizes
    head_dim = row.extra.get("head_dim") or hidden // heads
    q_size, kv_size = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if row.extra.get("tie_word_embeddings") is not True:
        shapes["lm_head.weight"] = (vocab, hidden)
    linears = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    biased: set[str] = set()
    if row.family == "qwen2":
        biased |= {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    if row.extra.get("attention_bias"):
        biased |= {name for name in linears if name.startswith("self_attn.")}
    if row.extra.get("mlp_bias"):
        biased |= {name for name in linears if name.startswith("mlp.")}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{prefix}{name}.bias": (linears[name][0],) for name in sorted(biased)}
        if row.family == "qwen3":
            shapes[prefix + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head_dim,)
    return shapes


def _uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 of mean 0 and variance 1, exact on every machine: Philox words scaled by a power of two, then sqrt(3)."""
    words = np.random.Philox(key=(seed << 32) | zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape) * math.sqrt(3.0)


def _scaled(name: str, u: np.ndarray) -> np.ndarray:
    """Scales under which every part of the model matters: attention is far from uniform (a wrong rotation shows), the
    layers outweigh the embedding (tied models do not just repeat their input), and norm weights and biases are not
    near one or zero."""
    if "word_embeddings_layernorm" in name:  # what enters the layers, as the embeddings of other models do
        return 0.1 + 0.05 * u if name.endswith(".weight") else 0.05 * u
    if name.endswith(".bias"):
        return 0.4 * u
    if u.ndim == 1:
        return 1.0 + 0.3 * u
    if name.endswith(("wte.weight", "word_embeddings.weight")):
        return 0.1 * u
    if "embed_tokens" in name:
        return 0.25 * u
    gain = 1.3 if "q_proj" in name or "k_proj" in name else 1.6 if "Wqkv" in name or "query_key_value" in name else 1.0
    return u * (gain / math.sqrt(u.shape[1]))


def weights(row: Row) -> Weights:
    """All tensors by their Hugging Face names, in the row's stored type; linears are [out, in]."""
    dtype = _NUMPY_DTYPES[row.dtype]
    return {
        name: _scaled(name, _uniform(row.seed, name, shape)).astype(np.float32).astype(dtype)
        for name, shape in _tensor_shapes(row).items()
    }


def prompt(row: Row) -> list[int]:
    """PROMPT_LENGTH token ids with the first and the last id of the vocabulary among them."""
    vocab = row.sizes[0]
    words = np.random.Philox(key=(row.seed << 32) | zlib.crc32(b"prompt")).random_raw(PROMPT_LENGTH)
    ids = [int(word % np.uint64(vocab)) for word in words]
    ids[3], ids[7] = 0, vocab - 1
    return ids


def write_safetensors(path: Path, tensors: Weights, dtype: str) -> None:
    """Write tensors that all have the type `dtype` ("f32", "f16", "bf16"): 8 bytes of header length, a JSON header,
    the data (the safetensors format; numpy itself knows no bf16, so the package's numpy writer may not serve)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


def build(row: Row, directory: Path) -> Path:
    """Write the row as a Hugging Face directory (config.json, safetensors, an index when sharded); returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(row), indent=2) + "\n")
    tensors = weights(row)
    if row.num_shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, row.dtype)
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(row.num_shards):
        file_name = f"model-{shard + 1:05d}-of-{row.num_shards:05d}.safetensors"
        # Round robin, so a layer's tensors lie in different files.
        part = {name: tensors[name] for name in list(tensors)[shard :: row.num_shards]}
        write_safetensors(directory / file_name, part, row.dtype)
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory


def fingerprint(row: Row) -> str:
    """SHA-256 of config, prompt and every weight: golden files name it, so a drifting builder is found at once."""
    digest = hashlib.sha256(json.dumps([config(row), prompt(row)], sort_keys=True).encode())
    for name, array in sorted(weights(row).items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
