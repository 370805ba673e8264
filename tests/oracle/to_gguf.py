"""GGUF files from the rows of tiny_models, and back: names, order of rotated rows and keys as published llama.cpp
conversions have them, so that the reader meets what real files hold.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from . import alibi_models, numpy_model, tiny_models

FileType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

_GGML_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{family: family for family in alibi_models.FAMILIES},
}
_GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.norm_f": "output_norm",
    "transformer.word_embeddings": "token_embd",
    "transformer.word_embeddings_layernorm": "token_embd_norm",
    "transformer.ln_f": "output_norm",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "norm_1": "attn_norm",
    "attn.Wqkv": "attn_qkv",
    "attn.out_proj": "attn_output",
    "norm_2": "ffn_norm",
    "ffn.up_proj": "ffn_up",
    "ffn.down_proj": "ffn_down",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor; KeyError for one these families do not have."""
    stem, suffix = name.rsplit(".", 1)
    if stem in _GLOBAL_NAMES:
        return f"{_GLOBAL_NAMES[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}.{suffix}"


def _rotated_heads(row: tiny_models.Row, name: str) -> int:
    """Heads of a tensor whose rows GGUF keeps as interleaved pairs; 0 for tensors that stay as they are.

    The `llama` architecture rotates neighbours (2j, 2j + 1) where Hugging Face rotates (j, j + Dh / 2).
    """
    if _ARCHITECTURES[row.family] != "llama":
        return 0
    *_, heads, kv_heads = row.sizes
    return heads if ".q_proj." in name else kv_heads if ".k_proj." in name else 0


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """[H * Dh, ...] with halves → with neighbouring pairs."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of _interleave."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _by_part(array: np.ndarray, heads: int) -> np.ndarray:
    """[H * 3 * Dh, ...], head after head with its Q, K and V (BLOOM) → all Q, all K, all V, as GGUF has them."""
    return array.reshape(heads, 3, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _by_head(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of _by_part."""
    return array.reshape(3, heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _add_alibi_metadata(writer: gguf.GGUFWriter, row: tiny_models.Row) -> None:
    config = tiny_models.config(row)
    vocab, hidden, ffn, layers, heads, _ = row.sizes
    writer.add_name(row.name)
    writer.add_vocab_size(vocab)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    if row.family == "mpt":
        writer.add_max_alibi_bias(config["attn_config"]["alibi_bias_max"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def _add_metadata(writer: gguf.GGUFWriter, row: tiny_models.Row, head_dim: int) -> None:
    config = tiny_models.config(row)
    vocab, hidden, ffn, layers, heads, kv_heads = row.sizes
    writer.add_name(row.name)
    writer.add_vocab_size(vocab)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    if "num_key_value_heads" in config:  # absent in old files: as many as heads
        writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if _ARCHITECTURES[row.family] == "llama":
        writer.add_rope_dimension_count(head_dim)
    if row.family == "mistral" and config["sliding_window"]:
        writer.add_sliding_window(config["sliding_window"])
    writer.add_string("tokenizer.ggml.model", "no_vocab")


def _add_rope(writer: gguf.GGUFWriter, row: tiny_models.Row, head_dim: int) -> None:
    config = tiny_models.config(row)
    rope = numpy_model.rope_parameters(config)
    if "rope_theta" in row.rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    match rope["rope_type"]:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "attention_factor" in rope:
                # llama.cpp multiplies what the method prescribes by the file's number.
                prescribed = 0.1 * math.log(rope["factor"]) + 1.0
                writer.add_rope_scaling_attn_factors(rope["attention_factor"] / prescribed)
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
        case "llama3":
            # Conversions say this scaling as one divisor per frequency, in a tensor of its own.
            plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
            scaled, _ = numpy_model.frequencies(config, head_dim)
            writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))


def convert(row: tiny_models.Row, path: Path, file_type: FileType = "f32") -> Path:
    """Write the row's weights as GGUF; returns `path`. Vectors stay f32, as everywhere.

    ValueError when a quantized type does not fit the row's sizes.
    """
    ggml_type, llama_file_type = _GGML_TYPES[file_type]
    *_, heads, _kv_heads = row.sizes
    head_dim = row.extra.get("head_dim") or row.sizes[1] // heads
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[row.family])
    writer.add_file_type(llama_file_type)
    if row.family in alibi_models.FAMILIES:
        _add_alibi_metadata(writer, row)
    else:
        _add_metadata(writer, row, head_dim)
        _add_rope(writer, row, head_dim)
    block_size, _ = gguf.GGML_QUANT_SIZES[ggml_type]
    for name, stored in tiny_models.weights(row).items():
        array = stored.astype(np.float32)
        if rotated := _rotated_heads(row, name):
            array = _interleave(array, rotated)
        if ".query_key_value." in name:
            array = _by_part(array, heads)
        if array.ndim == 1 or file_type == "f32":
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
            continue
        if array.shape[1] % block_size:
            raise ValueError(f"{row.name}: {name} has rows of {array.shape[1]}, {file_type} needs whole {block_size}s")
        packed = gguf.quants.quantize(np.ascontiguousarray(array), ggml_type)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantized(row: tiny_models.Row, path: Path) -> tiny_models.Weights:
    """What the file's weights mean, f32 under their Hugging Face names, read by the gguf package alone."""
    found = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    out = {}
    for name in tiny_models.weights(row):
        array = np.array(found[gguf_name(name)], dtype=np.float32)
        rotated = _rotated_heads(row, name)
        out[name] = _halves(array, rotated) if rotated else array
        if ".query_key_value." in name:
            out[name] = _by_head(array, row.sizes[4])
    return out
