"""The forward pass of a decoder, as op calls in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..backends.base import ModelWeights, Recorder, StepTensors
from ..ops.fused_gate_up_silu import ACTIVATIONS
from ..ops.fused_qkv_rope import INTERLEAVED
from ..types import Tensor
from .arch import Arch
from .checkpoint import Checkpoint
from .rope import rope_inv_freq


@dataclass(frozen=True)
class Decoder:
    """Records one step of `arch`. Five ops a layer, and one or two before and two after the layers."""

    arch: Arch
    attention_factor: float

    def __call__(self, recorder: Recorder, weights: Mapping[str, Tensor], kv: Tensor, step: StepTensors) -> None:
        arch, (T,) = self.arch, step.ids.shape
        norm = {"eps": arch.norm_eps, "center": int(arch.norm == "layer")}
        x = recorder.buffer("x", (T, arch.hidden_size))
        q = recorder.buffer("q", (T, arch.q_size))
        attended = recorder.buffer("attended", (T, arch.q_size))
        h = recorder.buffer("h", (T, arch.intermediate_size))
        cos_sin = recorder.buffer("cos_sin", (T, 2, arch.rotary_dim // 2))

        if arch.embed_norm:
            embedded = recorder.buffer("embedded", (T, arch.hidden_size))
            recorder.add("embedding", {"ids": step.ids, "weight": weights["embed"], "out": embedded})
            embed_norm = {"weight": weights["embed_norm"], "bias": weights.get("embed_norm_bias")}
            recorder.add("rms_norm", {"x": embedded, **embed_norm, "out": x}, norm)
        else:
            recorder.add("embedding", {"ids": step.ids, "weight": weights["embed"], "out": x})
        if arch.rotary_dim:
            recorder.add(
                "rope_table",
                {"positions": step.positions, "inv_freq": weights["rope_inv_freq"], "cos_sin": cos_sin},
                {"scale": self.attention_factor},
            )
        for layer in range(arch.num_layers):
            w = {slot: weights.get(f"layers.{layer}.{slot}") for slot in _LAYER_SLOTS}
            recorder.add(
                "fused_qkv_rope",
                {
                    "x": x,
                    "norm": w["attn_norm"],
                    "norm_bias": w["attn_norm_bias"],
                    "wq": w["q"],
                    "wk": w["k"],
                    "wv": w["v"],
                    "bq": w["q_bias"],
                    "bk": w["k_bias"],
                    "bv": w["v_bias"],
                    "q_norm": w["q_norm"],
                    "k_norm": w["k_norm"],
                    "cos_sin": cos_sin,
                    "positions": step.positions,
                    "seq": step.seq,
                    "page_table": step.page_table,
                    "kv": kv,
                    "q": q,
                },
                {
                    "layer": layer,
                    "rope_style": INTERLEAVED if arch.rope_style == "interleaved" else 0,
                    "qk_eps": arch.norm_eps,
                    **norm,
                },
            )
            attention = {
                "q": q,
                "kv": kv,
                "page_table": step.page_table,
                "positions": step.positions,
                "out": attended,
            }
            scalars = {
                "layer": layer,
                "window": arch.window(layer),
                "scale": arch.head_dim**-0.5,
                "alibi_max_bias": arch.alibi_max_bias,
            }
            if step.is_decode:
                recorder.add("paged_attention", attention, scalars)
            else:
                recorder.add("flash_attention", {**attention, "offsets": step.offsets}, scalars)
            recorder.add("linear", {"x": attended, "weight": w["o"], "bias": w["o_bias"], "residual": x, "out": x})
            recorder.add(
                "fused_gate_up_silu",
                {
                    "x": x,
                    "norm": w["ffn_norm"],
                    "norm_bias": w["ffn_norm_bias"],
                    "gate": w["gate"],
                    "up": w["up"],
                    "gate_bias": w["gate_bias"],
                    "up_bias": w["up_bias"],
                    "out": h,
                },
                {"activation": ACTIVATIONS.index(arch.activation), **norm},
            )
            recorder.add("linear", {"x": h, "weight": w["down"], "bias": w["down_bias"], "residual": x, "out": x})
        final_norm = {"weight": weights["final_norm"], "bias": weights.get("final_norm_bias")}
        if step.hidden is not None:
            recorder.add("rms_norm", {"x": x, **final_norm, "out": step.hidden}, norm)
        if step.logits is None:
            return
        final = recorder.buffer("final", (step.logits.shape[0], arch.hidden_size))
        recorder.add(
            "rms_norm",
            {"x": x, **final_norm, "rows": step.logits_rows, "out": final},
            norm,
        )
        recorder.add("linear", {"x": final, "weight": weights.get("lm_head", weights["embed"]), "out": step.logits})


_LAYER_SLOTS = (
    "attn_norm",
    "attn_norm_bias",
    "q",
    "k",
    "v",
    "q_bias",
    "k_bias",
    "v_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "ffn_norm",
    "ffn_norm_bias",
    "gate",
    "up",
    "gate_bias",
    "up_bias",
    "down",
    "down_bias",
)


def model_weights(checkpoint: Checkpoint, context_length: int) -> ModelWeights:
    """A checkpoint as a backend wants it. `context_length` is what the KV cache will hold (RoPE may depend on it)."""
    arch = checkpoint.arch
    tensors = dict(checkpoint.tensors)
    factors = tensors.pop("rope_factors", None)
    constants, attention_factor = {}, 1.0
    if arch.rotary_dim:
        inv_freq, attention_factor = rope_inv_freq(arch, None if factors is None else _to_f64(factors), context_length)
        constants["rope_inv_freq"] = Tensor.from_numpy(np.ascontiguousarray(inv_freq, np.float64))
    decoder = Decoder(arch, attention_factor)
    return ModelWeights(tensors, checkpoint.sources, str(checkpoint.path), constants, arch.vocab_size, decoder)


def _to_f64(tensor: Tensor) -> np.ndarray:
    return tensor.to_numpy().astype(np.float64)
