"""Write a GGUF file of a named model shape with random weights, for speed comparisons (nothing readable comes out).

python benchmarks/random_gguf.py OUT.gguf --shape qwen3-0.6b --type q4_0
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gguf
import numpy as np

from gllm_driver.quant.formats import FORMATS


@dataclass(frozen=True)
class Shape:
    arch: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    rope_theta: float


SHAPES = {
    "qwen3-0.6b": Shape("qwen3", 1024, 3072, 16, 8, 128, 151936, 28, 1e6),
    "llama-1b": Shape("llama", 2048, 8192, 32, 8, 64, 128256, 16, 5e5),
    "tiny": Shape("llama", 256, 704, 4, 2, 64, 4096, 4, 1e4),
}
Q4_K_M = "q4_k_m"  # a mix: mostly q4_k, some tensors q6_k
TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", Q4_K_M),
)
ENCODED_ROWS = 64  # made by the encoder; the rest of a matrix repeats them


def type_of(name: str, layer: int, layers: int, type_name: str) -> str:
    """The type of a tensor in a file of type `type_name`."""
    if type_name != Q4_K_M:
        return type_name
    favoured = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if name == "token_embd.weight" or (favoured and ("attn_v" in name or "ffn_down" in name)):
        return "q6_k"
    return "q4_k"


def encoded(values: np.ndarray, type_name: str) -> np.ndarray:
    if type_name in FORMATS:
        return FORMATS[type_name].quantize(values)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name.upper()])


def write(path: str, shape: Shape, type_name: str) -> None:
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(f"random {shape.arch}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    writer.add_vocab_size(shape.vocab)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, layer: int = 0) -> None:
        kind = type_of(name, layer, shape.layers, type_name)
        values = rng.standard_normal((ENCODED_ROWS, columns), dtype=np.float32) * 0.02
        some = encoded(values, kind)
        data = np.resize(some, (rows, some.shape[1]))
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])

    def ones(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, np.float32))

    matrix("token_embd.weight", shape.vocab, shape.hidden)
    ones("output_norm.weight", shape.hidden)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        ones(prefix + "attn_norm.weight", shape.hidden)
        ones(prefix + "ffn_norm.weight", shape.hidden)
        if shape.arch == "qwen3":
            ones(prefix + "attn_q_norm.weight", shape.head_dim)
            ones(prefix + "attn_k_norm.weight", shape.head_dim)
        matrix(prefix + "attn_q.weight", shape.heads * shape.head_dim, shape.hidden, layer)
        matrix(prefix + "attn_k.weight", shape.kv_heads * shape.head_dim, shape.hidden, layer)
        matrix(prefix + "attn_v.weight", shape.kv_heads * shape.head_dim, shape.hidden, layer)
        matrix(prefix + "attn_output.weight", shape.hidden, shape.heads * shape.head_dim, layer)
        matrix(prefix + "ffn_gate.weight", shape.ffn, shape.hidden, layer)
        matrix(prefix + "ffn_up.weight", shape.ffn, shape.hidden, layer)
        matrix(prefix + "ffn_down.weight", shape.hidden, shape.ffn, layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--type", choices=TYPES, default="f16", dest="type_name")
    arguments = parser.parse_args()
    write(arguments.out, SHAPES[arguments.shape], arguments.type_name)
