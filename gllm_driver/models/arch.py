"""What a decoder-only transformer is, in numbers: one `Arch` is all the forward pass needs to know of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RopeStyle = Literal["neox", "interleaved"]
Activation = Literal["silu", "gelu_tanh", "gelu"]
Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    kind: "none"; "linear" (Chen et al. 2023: positions divided by factor); "llama3" (Llama 3.1: low frequencies divided
    by factor, a smooth band between); "yarn" (Peng et al. 2023); "ntk" (base raised so that the lowest frequency is
    divided by factor); "factors" (one divisor per frequency, read from the model file into slot `rope_factors`).
    """

    kind: Literal["none", "linear", "llama3", "yarn", "ntk", "factors"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: what the method prescribes


@dataclass(frozen=True)
class Arch:
    """A decoder: norm → attention (GQA; RoPE or ALiBi) → residual → norm → FFN, gated or not → residual."""

    family: str  # a key of families.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm: Norm = "rms"
    norm_eps: float = 1e-6
    norm_bias: bool = False
    embed_norm: bool = False  # a norm of the embeddings, before the first layer
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_style: RopeStyle = "neox"
    rotary_dim: int = 0  # leading dims of a head that are rotated; equals head_dim for full rotary, 0 for ALiBi
    alibi_max_bias: float = 0.0  # of the slopes (ops/_attention.py); 0 means no ALiBi
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True  # down(act(gate(x)) · up(x)), else down(act(up(x)))
    qk_norm: bool = False  # RMSNorm over head_dim on each query and key head (Qwen3)
    tie_word_embeddings: bool = False
    activation: Activation = "silu"
    sliding_windows: tuple[int, ...] = ()  # per layer; 0 = full attention; empty = full everywhere
    num_labels: int = 0  # of a head that scores sequences; 0: there is none

    def window(self, layer: int) -> int:
        """Sliding window of a layer in tokens (the token itself included), 0 for full attention."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def tensor_slots(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Every tensor the forward pass reads, by slot name, with its shape [out, in] in elements.

    Slots: `embed`, `embed_norm`, `final_norm`, `lm_head` (absent when tied), `score` (of models that have labels) and,
    per layer i, `layers.{i}.` + attn_norm, q, k, v, q_norm, k_norm, o, ffn_norm, gate, up, down. Biases, where a model
    has them, are in slots of the same names with `_bias` behind.
    """
    d, ff = arch.hidden_size, arch.intermediate_size
    slots: dict[str, tuple[int, ...]] = {"embed": (arch.vocab_size, d), "final_norm": (d,)}
    if arch.embed_norm:
        slots["embed_norm"] = (d,)
    if arch.norm_bias:
        slots |= {f"{slot}_bias": (d,) for slot in ("embed_norm", "final_norm") if slot in slots}
    if not arch.tie_word_embeddings:
        slots["lm_head"] = (arch.vocab_size, d)
    if arch.num_labels:
        slots["score"] = (arch.num_labels, d)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "q": (arch.q_size, d),
        "k": (arch.kv_size, d),
        "v": (arch.kv_size, d),
        "o": (d, arch.q_size),
        "ffn_norm": (d,),
        "gate": (ff, d),
        "up": (ff, d),
        "down": (d, ff),
    }
    if arch.norm_bias:
        layer |= {"attn_norm_bias": (d,), "ffn_norm_bias": (d,)}
    if arch.qkv_bias:
        layer |= {"q_bias": (arch.q_size,), "k_bias": (arch.kv_size,), "v_bias": (arch.kv_size,)}
    if arch.o_bias:
        layer |= {"o_bias": (d,)}
    if arch.mlp_bias:
        layer |= {"gate_bias": (ff,), "up_bias": (ff,), "down_bias": (d,)}
    if not arch.gated_mlp:
        layer = {name: shape for name, shape in layer.items() if name not in ("gate", "gate_bias")}
    if arch.qk_norm:
        layer |= {"q_norm": (arch.head_dim,), "k_norm": (arch.head_dim,)}
    if arch.rope_scaling.kind == "factors":
        slots["rope_factors"] = (arch.rotary_dim // 2,)
    for i in range(arch.num_layers):
        slots |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return slots
