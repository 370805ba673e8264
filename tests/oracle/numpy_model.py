"""A decoder in float64 numpy, written from the definitions: no cache, no fusion, no tiling, nothing shared with the
package. It reads config.json in both conventions by itself and takes weights under their Hugging Face names.

Sources: RMSNorm, Zhang & Sennrich 2019; rotary embedding, Su et al. 2021 (halves of a head are rotated against each
other, as in GPT-NeoX); linear scaling, Chen et al. 2023; YaRN, Peng et al. 2023; Llama 3.1 scaling, as published with
the model; grouped queries, Ainslie et al. 2023; SwiGLU, Shazeer 2020; windows, Jiang et al. 2023 (Mistral).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import alibi_models

Config = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]
Rounding = Callable[[np.ndarray], np.ndarray]


def rope_parameters(config: Config) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and the scaling's own keys, from either convention of config.json."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.get("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return found


def _yarn(inv_freq: np.ndarray, rope: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """Dims that turn often over the original context stay, dims that turn little are interpolated, a ramp between."""
    dim, theta, factor = 2 * len(inv_freq), rope["rope_theta"], rope["factor"]

    def dim_with_turns(turns: float) -> float:
        return dim * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_with_turns(rope.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(dim_with_turns(rope.get("beta_slow") or 1.0)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0
    return inv_freq * (1.0 - ramp) + inv_freq / factor * ramp, attention_factor


def _llama3(inv_freq: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # over the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (smooth + (1.0 - smooth) / factor)


def frequencies(config: Config, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, float64 [head_dim / 2], and the factor on cos and sin."""
    rope = rope_parameters(config)
    inv_freq = rope["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope["rope_type"]:
        case "default" | "dynamic":  # dynamic NTK changes nothing within max_position_embeddings
            return inv_freq, 1.0
        case "linear":
            return inv_freq / rope["factor"], 1.0
        case "llama3":
            return _llama3(inv_freq, rope), 1.0
        case "yarn":
            return _yarn(inv_freq, rope)
    raise ValueError(f"rope_type {rope['rope_type']!r} is not one of default, dynamic, linear, llama3, yarn")


def window(config: Config, layer: int) -> int | None:
    """Tokens a token sees in this layer, itself included; None: all before it."""
    if config["model_type"] == "mistral":
        return config["sliding_window"]
    if not config.get("use_sliding_window"):
        return None
    if "layer_types" in config:
        return config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else None
    return config["sliding_window"] if layer >= config["max_window_layers"] else None


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rotate(x: np.ndarray, angles: np.ndarray, factor: float) -> np.ndarray:
    """x [T, heads, Dh], angles [T, Dh / 2]: dim j and dim j + Dh / 2 are one point in the plane."""
    half = x.shape[-1] // 2
    cos, sin = np.cos(angles)[:, None, :] * factor, np.sin(angles)[:, None, :] * factor
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """q [T, H, Dh], k and v [T, Hkv, Dh], visible [T, T] → [T, H * Dh]."""
    num_tokens, num_heads, head_dim = q.shape
    out = np.empty_like(q)
    for head in range(num_heads):
        kv_head = head * k.shape[1] // num_heads
        scores = np.where(visible, q[:, head] @ k[:, kv_head].T / math.sqrt(head_dim), -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = p / p.sum(axis=1, keepdims=True) @ v[:, kv_head]
    return out.reshape(num_tokens, num_heads * head_dim)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def logits(
    config: Config, weights: Weights, tokens: Sequence[int], round_activations: Rounding | None = None
) -> np.ndarray:
    """Float64 [T, vocab] for `tokens`. `round_activations` (rows in, rows out) is applied to the input of every matrix
    product with weights: it models an engine that quantizes activations, to know how much error that costs."""
    if config["model_type"] in alibi_models.FAMILIES:
        return alibi_models.logits(config, weights, tokens, round_activations)
    w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    eps, num_heads = config["rms_norm_eps"], config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    inv_freq, attention_factor = frequencies(config, head_dim)
    positions = np.arange(len(tokens))
    angles = positions[:, None] * inv_freq

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        x = round_activations(x) if round_activations else x
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    x = w["model.embed_tokens.weight"][list(tokens)]  # [T, D]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attn = prefix + "self_attn."
        h = _rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        q = linear(h, attn + "q_proj").reshape(-1, num_heads, head_dim)
        k = linear(h, attn + "k_proj").reshape(-1, num_kv_heads, head_dim)
        v = linear(h, attn + "v_proj").reshape(-1, num_kv_heads, head_dim)
        if attn + "q_norm.weight" in w:
            q = _rms_norm(q, w[attn + "q_norm.weight"], eps)
            k = _rms_norm(k, w[attn + "k_norm.weight"], eps)
        q, k = _rotate(q, angles, attention_factor), _rotate(k, angles, attention_factor)
        distance = positions[:, None] - positions[None, :]
        visible = (distance >= 0) & (distance < (window(config, layer) or len(tokens)))
        x = x + linear(_attention(q, k, v, visible), attn + "o_proj")
        h = _rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        h = _silu(linear(h, prefix + "mlp.gate_proj")) * linear(h, prefix + "mlp.up_proj")
        x = x + linear(h, prefix + "mlp.down_proj")
    x = _rms_norm(x, w["model.norm.weight"], eps)
    return linear(x, "lm_head" if "lm_head.weight" in w else "model.embed_tokens")


def greedy(config: Config, weights: Weights, tokens: Sequence[int], num_tokens: int) -> tuple[list[int], float]:
    """The most likely continuation, token by token, and its narrowest lead: over all steps, the least distance of the
    best logit to the second best, in standard deviations of that step's logits."""
    ids, margin = list(tokens), math.inf
    for _ in range(num_tokens):
        row = logits(config, weights, ids)[-1]
        second, best = np.sort(row)[-2:]
        margin = min(margin, float((best - second) / row.std()))
        ids.append(int(row.argmax()))
    return ids[len(tokens) :], margin
