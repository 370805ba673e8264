"""Names of tensors in model files → the slots of `tensor_slots`. Two tables, and one exact match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ModelFormatError
from ..types import FLOAT_DTYPES, DType
from .arch import Arch, tensor_slots


@dataclass(frozen=True)
class NameTable:
    """`model` and `layer` map slots to file names; `{i}` is the layer. `ignored` matches tensors that say nothing the
    model needs: they are tolerated, every other tensor without a slot is an error."""

    convention: str
    model: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]
    ignored: re.Pattern[str]

    def of(self, slot: str) -> str:
        """The file's name for a slot such as `embed` or `layers.3.q_bias`."""
        if slot in self.model:
            return self.model[slot]
        _, index, name = slot.split(".")
        return self.layer_prefix.format(i=index) + self.layer[name]

    def layers_among(self, names: Iterable[str]) -> set[int]:
        """The layer numbers that occur in tensor names."""
        pattern = re.compile(re.escape(self.layer_prefix).replace(re.escape("{i}"), r"(\d{1,9})"))
        return {int(match[1]) for name in names if (match := pattern.match(name))}


HF_NAMES = NameTable(
    convention="Hugging Face",
    model={
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
    },
    layer_prefix="model.layers.{i}.",
    layer={
        "attn_norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias",
        "v_bias": "self_attn.v_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "o": "self_attn.o_proj.weight",
        "o_bias": "self_attn.o_proj.bias",
        "ffn_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "gate_bias": "mlp.gate_proj.bias",
        "up_bias": "mlp.up_proj.bias",
        "down_bias": "mlp.down_proj.bias",
    },
    # Frequencies and masks that older versions of transformers saved; and the copy of tied embeddings.
    ignored=re.compile(
        r"model(\.layers\.\d+\.self_attn)?\.rotary_emb\.inv_freq"
        r"|model\.layers\.\d+\.self_attn\.(masked_)?bias"
        r"|lm_head\.weight"
    ),
)

GGUF_NAMES = NameTable(
    convention="GGUF",
    model={
        "embed": "token_embd.weight",
        "final_norm": "output_norm.weight",
        "lm_head": "output.weight",
        "rope_factors": "rope_freqs.weight",
    },
    layer_prefix="blk.{i}.",
    layer={
        "attn_norm": "attn_norm.weight",
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "q_bias": "attn_q.bias",
        "k_bias": "attn_k.bias",
        "v_bias": "attn_v.bias",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "o": "attn_output.weight",
        "o_bias": "attn_output.bias",
        "ffn_norm": "ffn_norm.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
        "gate_bias": "ffn_gate.bias",
        "up_bias": "ffn_up.bias",
        "down_bias": "ffn_down.bias",
    },
    ignored=re.compile(r"blk\.\d+\.attn_rot_embd"),
)


class Described(Protocol):
    """What the match needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType | None: ...
    @property
    def path(self) -> Path: ...


def match_slots(arch: Arch, table: NameTable, stored: Mapping[str, Described], path: Path) -> dict[str, str]:
    """The stored name of every slot of `arch`: each slot exactly one tensor of its shape, each tensor exactly one slot.

    Raises ModelFormatError for a wrong number of layers, a missing tensor, a wrong shape, a norm or bias that is not
    f32, f16 or bf16, and a tensor that no slot uses.
    """
    layers = table.layers_among(stored)
    if layers != set(range(min(arch.num_layers, len(layers) + 1))):
        have = f"{len(layers)} ({min(layers)} … {max(layers)})" if layers else "none"
        raise ModelFormatError(
            f"the description says {arch.num_layers} layers, the tensors ({table.convention} names) are of {have}",
            path=path,
        )
    slots = tensor_slots(arch)
    matched = {slot: table.of(slot) for slot in slots}
    for slot, name in matched.items():
        if name not in stored:
            raise ModelFormatError(
                f"is missing; a {arch.family} model with these settings needs it, of shape {list(slots[slot])}",
                path=path,
                tensor=name,
            )
        _check(slot, name, slots[slot], stored[name])
    used = set(matched.values())
    for name in sorted(stored):
        if name not in used and not table.ignored.fullmatch(name):
            raise ModelFormatError(
                f"has no place in a {arch.family} model with these settings; the file holds something this version "
                "does not compute",
                path=stored[name].path,
                tensor=name,
            )
    return matched


def _check(slot: str, name: str, shape: tuple[int, ...], tensor: Described) -> None:
    if tensor.shape != shape:
        raise ModelFormatError(f"has shape {list(tensor.shape)}, expected {list(shape)}", path=tensor.path, tensor=name)
    if len(shape) == 1 and tensor.dtype is not None and tensor.dtype.name not in FLOAT_DTYPES:
        raise ModelFormatError(
            f"has type {tensor.dtype.name}, but norms and biases must be {', '.join(FLOAT_DTYPES)}",
            path=tensor.path,
            tensor=name,
        )
