"""Names of tensors in model files → the slots of `tensor_slots`. A table per convention, and one exact match."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..errors import ModelFormatError
from ..types import FLOAT_DTYPES, DType
from .arch import Arch, tensor_slots


@dataclass(frozen=True)
class NameTable:
    """`model` and `layer` map slots to file names; `{i}` is the layer. `ignored` matches tensors that say nothing the
    model needs: they are tolerated, every other tensor without a slot is an error.

    Slots of one name lie in one tensor, rows after rows in the order of the slots; with `heads_interleaved`, head after
    head, each with its rows of all the slots. Files may leave out `prefix`."""

    convention: str
    model: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]
    ignored: re.Pattern[str]
    prefix: str = ""
    heads_interleaved: bool = False

    def fitting(self, names: Iterable[str]) -> NameTable:
        """This table, without its prefix where none of `names` has it."""
        if not self.prefix or any(name.startswith(self.prefix) for name in names):
            return self
        model = {slot: name.removeprefix(self.prefix) for slot, name in self.model.items()}
        return replace(self, model=model, layer_prefix=self.layer_prefix.removeprefix(self.prefix), prefix="")

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
    prefix="model.",  # which models without any head leave out
    model={
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
        "score": "score.weight",
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
        "embed_norm": "token_embd_norm.weight",
        "embed_norm_bias": "token_embd_norm.bias",
        "final_norm": "output_norm.weight",
        "final_norm_bias": "output_norm.bias",
        "lm_head": "output.weight",
        "rope_factors": "rope_freqs.weight",
    },
    layer_prefix="blk.{i}.",
    layer={
        "attn_norm": "attn_norm.weight",
        "attn_norm_bias": "attn_norm.bias",
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
        "ffn_norm_bias": "ffn_norm.bias",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
        "gate_bias": "ffn_gate.bias",
        "up_bias": "ffn_up.bias",
        "down_bias": "ffn_down.bias",
    },
    ignored=re.compile(r"blk\.\d+\.attn_rot_embd"),
)


MPT_NAMES = NameTable(
    convention="Hugging Face MPT",
    prefix="transformer.",
    model={
        "embed": "transformer.wte.weight",
        "final_norm": "transformer.norm_f.weight",
        "final_norm_bias": "transformer.norm_f.bias",
        "lm_head": "lm_head.weight",
    },
    layer_prefix="transformer.blocks.{i}.",
    layer={
        "attn_norm": "norm_1.weight",
        "attn_norm_bias": "norm_1.bias",
        **dict.fromkeys(("q", "k", "v"), "attn.Wqkv.weight"),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), "attn.Wqkv.bias"),
        "o": "attn.out_proj.weight",
        "o_bias": "attn.out_proj.bias",
        "ffn_norm": "norm_2.weight",
        "ffn_norm_bias": "norm_2.bias",
        "up": "ffn.up_proj.weight",
        "down": "ffn.down_proj.weight",
        "up_bias": "ffn.up_proj.bias",
        "down_bias": "ffn.down_proj.bias",
    },
    ignored=re.compile(r"lm_head\.weight"),
)

BLOOM_NAMES = NameTable(
    convention="Hugging Face BLOOM",
    prefix="transformer.",
    heads_interleaved=True,
    model={
        "embed": "transformer.word_embeddings.weight",
        "embed_norm": "transformer.word_embeddings_layernorm.weight",
        "embed_norm_bias": "transformer.word_embeddings_layernorm.bias",
        "final_norm": "transformer.ln_f.weight",
        "final_norm_bias": "transformer.ln_f.bias",
        "lm_head": "lm_head.weight",
    },
    layer_prefix="transformer.h.{i}.",
    layer={
        "attn_norm": "input_layernorm.weight",
        "attn_norm_bias": "input_layernorm.bias",
        **dict.fromkeys(("q", "k", "v"), "self_attention.query_key_value.weight"),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), "self_attention.query_key_value.bias"),
        "o": "self_attention.dense.weight",
        "o_bias": "self_attention.dense.bias",
        "ffn_norm": "post_attention_layernorm.weight",
        "ffn_norm_bias": "post_attention_layernorm.bias",
        "up": "mlp.dense_h_to_4h.weight",
        "down": "mlp.dense_4h_to_h.weight",
        "up_bias": "mlp.dense_h_to_4h.bias",
        "down_bias": "mlp.dense_4h_to_h.bias",
    },
    ignored=re.compile(r"lm_head\.weight"),
)

GGUF_FUSED_NAMES = replace(
    GGUF_NAMES,
    layer={
        **GGUF_NAMES.layer,
        **dict.fromkeys(("q", "k", "v"), "attn_qkv.weight"),
        **dict.fromkeys(("q_bias", "k_bias", "v_bias"), "attn_qkv.bias"),
    },
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
    """The stored name of every slot of `arch`: each slot exactly one tensor, each tensor exactly the slots of its name.

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
    shapes: dict[str, tuple[int, ...]] = {}
    for slot, name in matched.items():
        rows, *rest = slots[slot]
        shapes[name] = (rows + shapes[name][0] if name in shapes else rows, *rest)
    for name, shape in shapes.items():
        if name not in stored:
            raise ModelFormatError(
                f"is missing; a {arch.family} model with these settings needs it, of shape {list(shape)}",
                path=path,
                tensor=name,
            )
        _check(name, shape, stored[name])
    for name in sorted(stored):
        if name not in shapes and not table.ignored.fullmatch(name):
            raise ModelFormatError(
                f"has no place in a {arch.family} model with these settings; the file holds something this version "
                "does not compute",
                path=stored[name].path,
                tensor=name,
            )
    return matched


def _check(name: str, shape: tuple[int, ...], tensor: Described) -> None:
    if tensor.shape != shape:
        raise ModelFormatError(f"has shape {list(tensor.shape)}, expected {list(shape)}", path=tensor.path, tensor=name)
    if len(shape) == 1 and tensor.dtype is not None and tensor.dtype.name not in FLOAT_DTYPES:
        raise ModelFormatError(
            f"has type {tensor.dtype.name}, but norms and biases must be {', '.join(FLOAT_DTYPES)}",
            path=tensor.path,
            tensor=name,
        )
