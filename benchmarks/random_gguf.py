"""Write a GGUF file of a named model shape with random weights, for speed comparisons (nothing readable comes out).

python benchmarks/random_gguf.py OUT.gguf --shape qwen3-0.6b --type q4_0
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import gguf
import numpy as np


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
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


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
    kind = TYPES[type_name]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

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
        matrix(prefix + "attn_q.weight", shape.heads * shape.head_dim, shape.hidden)
        matrix(prefix + "attn_k.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        matrix(prefix + "attn_v.weight", shape.kv_heads * shape.head_dim, shape.hidden)
        matrix(prefix + "attn_output.weight", shape.hidden, shape.heads * shape.head_dim)
        matrix(prefix + "ffn_gate.weight", shape.ffn, shape.hidden)
        matrix(prefix + "ffn_up.weight", shape.ffn, shape.hidden)
        matrix(prefix + "ffn_down.weight", shape.hidden, shape.ffn)
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
