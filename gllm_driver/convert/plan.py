"""What the output holds: every tensor with its name, its type and the slots its rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ..errors import ModelFormatError, RequestError
from ..models.arch import Arch
from ..models.checkpoint import Checkpoint
from ..models.families import FAMILIES
from ..models.names import GGUF_NAMES
from ..types import DTYPES, F32, DType
from .kinds import GGUF_IDS, dtype_named, gguf_types, is_gguf_name, stored_bits

# At two bits and less: what embeds and reads out words, and the matrices whose errors reach the residual stream most.
SENSITIVE_SLOTS = ("embed", "lm_head", "v", "down")
SENSITIVE_TYPES = {True: "q4_k", False: "int4_64m"}  # by whether the output is GGUF
_FALLBACK = {True: "q8_0", False: "int8_32"}  # where rows are no whole blocks of those


@dataclass(frozen=True)
class Output:
    """A tensor of the output. Rows of `slots`, one after another, in `order` where that is not None."""

    name: str
    slots: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: DType
    order: np.ndarray | None = None
    reason: str = ""  # why it has another type than was asked for

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1


@dataclass(frozen=True)
class Plan:
    """`outputs` in the order they are written, which is that of a forward pass: vectors, embeddings, layers, output."""

    is_gguf: bool
    dtype: DType
    outputs: tuple[Output, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def matrices(self) -> list[Output]:
        return [output for output in self.outputs if output.is_matrix]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(np.prod(o.shape[:-1])) * o.dtype.row_nbytes(o.shape[-1]) for o in self.outputs)


def plan_of(
    checkpoint: Checkpoint, type_name: str, block: int | None = None, keep: Sequence[tuple[str, str]] = ()
) -> Plan:
    """keep: (glob over tensor names, type), of which the first that matches decides.

    Raises RequestError for a type that is unknown, does not fit the file or the rows of a tensor, and for a pattern
    that matches no matrix.
    """
    dtype, is_gguf = dtype_named(type_name, block), is_gguf_name(type_name)
    kept = [(pattern, _kept_type(name, is_gguf)) for pattern, name in keep]
    used: set[str] = set()
    outputs = []
    for name, slots in _names(checkpoint, is_gguf).items():
        shape = _shape(checkpoint, slots)
        order = _order(checkpoint, slots, is_gguf)
        if len(shape) == 1:
            stored = checkpoint.tensors[slots[0]].dtype
            outputs.append(Output(name, slots, shape, F32 if is_gguf else stored, order))
            continue
        aliases = {name, *(checkpoint.sources[slot] for slot in slots)}
        matching = [p for p, _ in kept if any(fnmatchcase(alias, p) for alias in aliases)]
        used.update(matching)
        chosen, reason = dtype, ""
        if matching:
            chosen, reason = next(d for p, d in kept if p == matching[0]), f"--keep {matching[0]}"
        elif stored_bits(dtype) <= 2 and any(slot.rpartition(".")[2] in SENSITIVE_SLOTS for slot in slots):
            chosen, reason = _sensitive(shape, is_gguf), "sensitive"
        _check_rows(name, shape, chosen, checkpoint.path)
        outputs.append(Output(name, slots, shape, chosen, order, reason))
    for pattern, _ in kept:
        if pattern not in used:
            names = ", ".join(o.name for o in outputs if o.is_matrix)
            raise RequestError(f"--keep {pattern!r} matches no matrix; their names are {names[:200]} …")
    outputs.sort(key=lambda output: (output.is_matrix, _place(output.slots[0])))
    return Plan(is_gguf, dtype, tuple(outputs))


def _kept_type(name: str, is_gguf: bool) -> DType:
    dtype = dtype_named(name)
    if is_gguf and dtype.name not in GGUF_IDS:
        raise RequestError(f"a GGUF file cannot hold {dtype.name}; it holds {gguf_types()}")
    return dtype


def _sensitive(shape: tuple[int, ...], is_gguf: bool) -> DType:
    dtype = DTYPES[SENSITIVE_TYPES[is_gguf]]
    return dtype if shape[-1] % dtype.block_size == 0 else DTYPES[_FALLBACK[is_gguf]]


def _check_rows(name: str, shape: tuple[int, ...], dtype: DType, path: Path) -> None:
    if shape[-1] % dtype.block_size:
        raise ModelFormatError(
            f"has rows of {shape[-1]}, no whole number of {dtype.name} blocks of {dtype.block_size}; choose "
            f"another type or block size, for it alone with --keep '{name}=TYPE'",
            path=path,
            tensor=name,
        )


def _names(checkpoint: Checkpoint, is_gguf: bool) -> dict[str, tuple[str, ...]]:
    """The slots of each tensor of the output by its name: the source's own, or GGUF's for a Hugging Face model."""
    if is_gguf and not is_from_gguf(checkpoint):
        table = FAMILIES[checkpoint.arch.family].gguf_names
        names = {slot: table.of(slot) for slot in checkpoint.tensors}
    else:
        names = dict(checkpoint.sources)
    found: dict[str, tuple[str, ...]] = {}
    for slot, name in names.items():
        found[name] = (*found.get(name, ()), slot)
    return found


def is_from_gguf(checkpoint: Checkpoint) -> bool:
    """Whether the source names its tensors as GGUF does."""
    return checkpoint.sources["final_norm"] == GGUF_NAMES.model["final_norm"]


def _shape(checkpoint: Checkpoint, slots: Sequence[str]) -> tuple[int, ...]:
    shapes = [checkpoint.tensors[slot].shape for slot in slots]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _order(checkpoint: Checkpoint, slots: Sequence[str], is_gguf: bool) -> np.ndarray | None:
    """Rows of the slots in the order of the output; None: as they are."""
    arch = checkpoint.arch
    if is_gguf and not is_from_gguf(checkpoint):
        return _rotated_order(arch, slots[0]) if len(slots) == 1 else None
    if len(slots) > 1 and not is_from_gguf(checkpoint) and FAMILIES[arch.family].hf_names.heads_interleaved:
        rows = np.arange(sum(checkpoint.tensors[slot].shape[0] for slot in slots))
        return rows.reshape(len(slots), arch.num_heads, -1).swapaxes(0, 1).reshape(-1)
    return None


def _rotated_order(arch: Arch, slot: str) -> np.ndarray | None:
    """GGUF's llama rotates neighbouring rows of a head, Hugging Face row i against row i + half."""
    kind = slot.rpartition(".")[2]
    heads = {"q": arch.num_heads, "q_bias": arch.num_heads, "k": arch.num_kv_heads, "k_bias": arch.num_kv_heads}
    if gguf_architecture(arch) != "llama" or kind not in heads:
        return None
    half = arch.rotary_dim // 2
    rows = np.arange(heads[kind] * arch.head_dim).reshape(heads[kind], arch.head_dim)
    rotated = rows[:, : 2 * half].reshape(heads[kind], 2, half).swapaxes(1, 2).reshape(heads[kind], -1)
    return np.concatenate([rotated, rows[:, 2 * half :]], axis=1).reshape(-1)


def gguf_architecture(arch: Arch) -> str:
    """`general.architecture` of a family. Mistral's files are llama's."""
    return (FAMILIES[arch.family].gguf_architectures or ("llama",))[0]


_IN_LAYER = ("q", "k", "v", "o", "gate", "up", "down")


def _place(slot: str) -> tuple[int, int]:
    """Where a matrix stands in the forward pass."""
    if not slot.startswith("layers."):
        return (1 << 30, 0) if slot == "lm_head" else (-1, 0)
    _, layer, kind = slot.split(".")
    return int(layer), _IN_LAYER.index(kind) if kind in _IN_LAYER else -1


def parse_keep(text: str) -> tuple[str, str]:
    """PATTERN=TYPE → both. Raises RequestError."""
    pattern, sign, name = text.rpartition("=")
    if not sign or not pattern or not name:
        raise RequestError(f"--keep takes PATTERN=TYPE, as in 'token_embd*=q8_0', got {text!r}")
    return pattern, name


def types_of(plan: Plan) -> Mapping[str, DType]:
    """The type of every tensor by name."""
    return {output.name: output.dtype for output in plan.outputs}
