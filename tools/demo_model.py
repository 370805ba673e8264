"""The demo model in plain PyTorch: the Llama architecture (Touvron et al. 2023) at 7 million parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone uses


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def hf(self) -> dict[str, Any]:
        """The same as a Hugging Face config.json of LlamaForCausalLM; token 0 is <|endoftext|>, there is no BOS."""
        fixed = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "rope_scaling": None,
            "use_cache": True,
            "bos_token_id": None,
            "eos_token_id": 0,
            "torch_dtype": "float16",
        }
        return fixed | asdict(self)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).type_as(x)


def rope_table(config: DemoConfig) -> Tensor:
    """[2, context, head_dim] f32: cosines and sines of the angles (Su et al. 2021), the two halves of a head rotated
    against each other as in GPT-NeoX and in Hugging Face's Llama."""
    frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings).double(), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x [B, heads, T, head_dim] by the angles of rope [2, T, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return (x * rope[0] + torch.cat([-right, left], dim=-1) * rope[1]).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (rotate(k, rope), v))
        y = F.scaled_dot_product_attention(rotate(q, rope), k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DemoConfig, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = dropout

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), rope), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class DemoModel(nn.Module):
    """Parameter names are those of LlamaForCausalLM without the leading ``model.``; the output layer is the embedding.

    `dropout` acts on what each attention and each MLP adds to the residual stream (Srivastava et al. 2014)."""

    rope: Tensor

    def __init__(self, config: DemoConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("rope", rope_table(config), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts smaller the deeper the model is (GPT-2).
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * config.num_hidden_layers) if into_residual else 1))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, vocab] f32 of token ids [B, T]."""
        x = self.embed_tokens(ids)
        rope = self.rope[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x, rope)
        return F.linear(self.norm(x), self.embed_tokens.weight).float()

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed negative log-likelihood in nats of `targets` [B, T]; positions with target -100 do not count."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")

    def hf_state(self) -> dict[str, Tensor]:
        """Weights in float16 under Hugging Face names."""
        return {f"model.{name}": p.detach().to("cpu", torch.float16) for name, p in self.state_dict().items()}


@torch.no_grad()
def orthogonalize(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g [N, rows, cols], roughly: the quintic Newton-Schulz iteration of Muon
    (Jordan et al. 2024), whose coefficients push all singular values into about [0.7, 1.2] in five steps."""
    x = g.bfloat16()
    if wide := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if wide else x).type_as(g)


class Muon:
    """Momentum whose update is orthogonalized, for the weight matrices of the layers; equal shapes go in one batch.
    Decoupled weight decay; the step is scaled to the root mean square of AdamW's (Liu et al. 2025, 0.2 max(dims)^0.5)
    so that one learning rate suits both optimizers."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        shapes = {p.shape for p in parameters}
        self.groups = [[p for p in parameters if p.shape == shape] for shape in sorted(shapes)]
        self.velocity = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]
        self.weight_decay = weight_decay
        self.momentum = momentum

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group, velocity in zip(self.groups, self.velocity, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(velocity, self.momentum))  # Nesterov
            scale = 0.2 * math.sqrt(max(gradient.shape[1:]))
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - learning_rate * self.weight_decay).sub_(direction, alpha=learning_rate * scale)
