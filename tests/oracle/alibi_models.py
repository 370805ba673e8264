"""Tiny models with ALiBi, MPT and BLOOM: what their files hold, and what they compute, in float64 from the definitions.

Sources: ALiBi, Press et al. 2022 (arXiv 2108.12409), with its rule for head counts that are no power of two; LayerNorm,
Ba et al. 2016; GELU, Hendrycks & Gimpel 2016, exact for MPT and in the tanh form for BLOOM (Le Scao et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Config = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]
Sizes = tuple[int, int, int, int, int, int]  # vocab, hidden, ffn, layers, heads, kv heads

FAMILIES = ("mpt", "bloom")


def config(family: str, sizes: Sizes) -> dict[str, Any]:
    """What config.json says besides the type of the weights. The feed-forward size follows from the hidden one."""
    vocab, hidden, ffn, layers, heads, kv_heads = sizes
    assert ffn == 4 * hidden
    assert heads == kv_heads
    shared = {"vocab_size": vocab, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "use_cache": True}
    if family == "bloom":
        return {
            **shared,
            "architectures": ["BloomForCausalLM"],
            "model_type": "bloom",
            "n_embed": hidden,
            "n_layer": layers,
            "num_attention_heads": heads,
            "apply_residual_connection_post_layernorm": False,
            "masked_softmax_fusion": True,
            "pretraining_tp": 2,
            "seq_length": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    return {
        **shared,
        "architectures": ["MPTForCausalLM" if layers > 2 else "MptForCausalLM"],  # the name in older files, and today's
        "model_type": "mpt",
        "d_model": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "expansion_ratio": 4,
        "max_seq_len": 512,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "learned_pos_emb": True,
        "logit_scale": None,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
    }


def tensor_shapes(family: str, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file by its Hugging Face name; the embeddings are tied."""
    vocab, hidden, ffn, layers, *_ = sizes
    shapes: dict[str, tuple[int, ...]]
    if family == "mpt":
        shapes = {"transformer.wte.weight": (vocab, hidden), "transformer.norm_f.weight": (hidden,)}
        for i in range(layers):
            prefix = f"transformer.blocks.{i}."
            shapes |= {prefix + f"norm_{n}.weight": (hidden,) for n in (1, 2)}
            shapes[prefix + "attn.Wqkv.weight"] = (3 * hidden, hidden)
            shapes[prefix + "attn.out_proj.weight"] = (hidden, hidden)
            shapes[prefix + "ffn.up_proj.weight"] = (ffn, hidden)
            shapes[prefix + "ffn.down_proj.weight"] = (hidden, ffn)
        return shapes
    shapes = {"transformer.word_embeddings.weight": (vocab, hidden)}
    norms, linears = ["transformer.word_embeddings_layernorm", "transformer.ln_f"], {}
    for i in range(layers):
        prefix = f"transformer.h.{i}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        linears[prefix + "self_attention.query_key_value"] = (3 * hidden, hidden)
        linears[prefix + "self_attention.dense"] = (hidden, hidden)
        linears[prefix + "mlp.dense_h_to_4h"] = (ffn, hidden)
        linears[prefix + "mlp.dense_4h_to_h"] = (hidden, ffn)
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def slopes(num_heads: int, max_bias: float) -> list[float]:
    """One per head, as the paper's code has it: for a power of two a geometric series that ends at 2^-max_bias; else
    those of the next lower power, then every other one of the next higher power."""
    if num_heads & (num_heads - 1) == 0:
        return [2.0 ** (-max_bias * (i + 1) / num_heads) for i in range(num_heads)]
    lower = 2 ** math.floor(math.log2(num_heads))
    return slopes(lower, max_bias) + slopes(2 * lower, max_bias)[0::2][: num_heads - lower]


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, eps: float) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, max_bias: float) -> np.ndarray:
    """q, k, v [T, H, Dh] → [T, H * Dh]: every token sees those before it, the farther the less."""
    num_tokens, num_heads, head_dim = q.shape
    distance = np.arange(num_tokens)[:, None] - np.arange(num_tokens)[None, :]
    out = np.empty_like(q)
    for head, slope in enumerate(slopes(num_heads, max_bias)):
        scores = q[:, head] @ k[:, head].T / math.sqrt(head_dim) - slope * distance
        scores = np.where(distance >= 0, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = p / p.sum(axis=1, keepdims=True) @ v[:, head]
    return out.reshape(num_tokens, -1)


def logits(
    config: Config,
    weights: Weights,
    tokens: Sequence[int],
    round_activations: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Float64 [T, vocab], as numpy_model.logits."""
    w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    is_mpt, eps = config["model_type"] == "mpt", config["layer_norm_epsilon"]
    num_heads = config["n_heads"] if is_mpt else config["num_attention_heads"]
    max_bias = config["attn_config"]["alibi_bias_max"] if is_mpt else 8

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        x = round_activations(x) if round_activations else x
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return _layer_norm(x, w[name + ".weight"], w.get(name + ".bias", 0.0), eps)

    embeddings = "transformer.wte" if is_mpt else "transformer.word_embeddings"
    x = w[embeddings + ".weight"][list(tokens)]
    hidden, num_tokens = x.shape[1], len(tokens)
    if not is_mpt:
        x = norm(x, "transformer.word_embeddings_layernorm")
    for i in range(config["n_layers" if is_mpt else "n_layer"]):
        if is_mpt:  # all queries, all keys, all values
            layer = f"transformer.blocks.{i}."
            rows = linear(norm(x, layer + "norm_1"), layer + "attn.Wqkv")
            q, k, v = rows.reshape(num_tokens, 3, num_heads, -1).transpose(1, 0, 2, 3)
            x = x + linear(_attention(q, k, v, max_bias), layer + "attn.out_proj")
            h = _gelu(linear(norm(x, layer + "norm_2"), layer + "ffn.up_proj"))
            x = x + linear(h, layer + "ffn.down_proj")
        else:  # head by head its query, its key, its value
            layer = f"transformer.h.{i}."
            rows = linear(norm(x, layer + "input_layernorm"), layer + "self_attention.query_key_value")
            q, k, v = rows.reshape(num_tokens, num_heads, 3, -1).transpose(2, 0, 1, 3)
            x = x + linear(_attention(q, k, v, max_bias), layer + "self_attention.dense")
            h = _gelu_tanh(linear(norm(x, layer + "post_attention_layernorm"), layer + "mlp.dense_h_to_4h"))
            x = x + linear(h, layer + "mlp.dense_4h_to_h")
    assert x.shape == (num_tokens, hidden)
    return linear(norm(x, "transformer.norm_f" if is_mpt else "transformer.ln_f"), embeddings)
