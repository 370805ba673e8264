"""Tensors that hold several slots (Q, K and V in one matrix), taken apart."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from ..models.arch import Arch, tensor_slots
from ..models.names import NameTable
from ..types import Tensor


def split_fused(
    arch: Arch, table: NameTable, sources: Mapping[str, str], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensor of every slot: `sources` names the stored one it lies in.

    Rows that follow each other stay where they are. Rows that lie head by head are copied apart.
    """
    shapes = tensor_slots(arch)
    sharing: dict[str, list[str]] = {}
    for slot, name in sources.items():
        sharing.setdefault(name, []).append(slot)
    tensors: dict[str, Tensor] = {}
    for name, slots in sharing.items():
        if len(slots) == 1:
            tensors[slots[0]] = stored[name]
        elif table.heads_interleaved:
            tensors |= _gathered(stored[name], slots, arch.num_heads)
        else:
            first = 0
            for slot in slots:
                tensors[slot] = _rows(stored[name], first, shapes[slot])
                first += shapes[slot][0]
    return {slot: tensors[slot] for slot in sources}


def _rows(tensor: Tensor, first: int, shape: tuple[int, ...]) -> Tensor:
    row_nbytes = tensor.nbytes // tensor.shape[0]  # of a matrix, or one element of a bias
    return Tensor(tensor.address + first * row_nbytes, shape, tensor.dtype, tensor.owner)


def _gathered(tensor: Tensor, slots: list[str], num_heads: int) -> dict[str, Tensor]:
    """Copies of the slots' rows out of [num_heads, len(slots), head_dim, …]."""
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.address))
    parts = memory.reshape(num_heads, len(slots), -1)
    shape = (tensor.shape[0] // len(slots), *tensor.shape[1:])
    return {
        slot: Tensor.from_numpy(np.ascontiguousarray(parts[:, i]).reshape(-1), tensor.dtype, shape)
        for i, slot in enumerate(slots)
    }
