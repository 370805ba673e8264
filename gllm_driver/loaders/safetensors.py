"""Safetensors files, single and sharded, memory-mapped.

Format: https://github.com/huggingface/safetensors#format — u64 little-endian header length, a JSON header
{name: {dtype, shape, data_offsets: [begin, end)}}, then the data. Offsets count from the end of the header; the tensors
must cover the data without holes or overlaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError
from ..types import BF16, F16, F32, DType
from .jsonfile import parse_object, read_object
from .mapping import FileMapping, StoredTensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

READABLE: dict[str, DType] = {"F32": F32, "F16": F16, "BF16": BF16}

# Bits per element of every type of the format, so that sizes are checked for tensors we do not read, too.
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_MAX_HEADER_NBYTES = 100_000_000  # the limit of the reference implementation
_MAX_AXES = 8


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name; ModelFormatError when anything about the file is not as the format says."""
    file = FileMapping(path)
    if file.nbytes < 8:
        raise ModelFormatError(f"has {file.nbytes} bytes, too short for a safetensors file", path=path)
    header_nbytes = int.from_bytes(file.buffer[:8], "little")
    if header_nbytes > min(file.nbytes - 8, _MAX_HEADER_NBYTES):
        raise ModelFormatError(
            f"the header claims {header_nbytes} bytes in a file of {file.nbytes}: truncated, or not safetensors",
            path=path,
            offset=0,
        )
    begin = 8 + header_nbytes
    header = parse_object(file.buffer[8:begin], path, "the safetensors header")
    header.pop("__metadata__", None)
    tensors = {name: _stored_tensor(name, entry, file, begin) for name, entry in header.items()}
    _check_cover(tensors.values(), file, begin)
    return {tensor.name: tensor for tensor, _ in tensors.values()}


def read_safetensors_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards that a `*.safetensors.index.json` names.

    Raises ModelFormatError for a missing shard, a shard outside the index's own folder, a tensor that its shard lacks,
    and a tensor that two shards hold.
    """
    index = read_object(path)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards_of_index(index, path):
        if not (path.parent / shard).exists():
            raise ModelFormatError(f"the shard {shard} is missing; fetch the whole model again", path=path)
        for name, tensor in read_safetensors(path.parent / shard).items():
            if name in tensors:
                raise ModelFormatError(
                    f"is in two shards, {tensors[name].path.name} and {shard}", path=path, tensor=name
                )
            tensors[name] = tensor
    for name, shard in index["weight_map"].items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ModelFormatError(f"is not in the shard {shard} that weight_map names", path=path, tensor=name)
    return tensors


def shards_of_index(index: Mapping[str, Any], path: Path) -> list[str]:
    """The names of the shard files in an index, the object that the file at `path` holds.

    Raises ModelFormatError when one is not a plain name in the index's own folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ModelFormatError("weight_map must map tensor names to shard files", path=path)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise ModelFormatError(
                f"weight_map names {shard!r}, which is no safetensors file of this folder", path=path
            )
    return shards


def _stored_tensor(name: str, entry: Any, file: FileMapping, begin: int) -> tuple[StoredTensor, int]:
    """The checked description of a tensor, and its size in bytes."""

    def fail(problem: str) -> ModelFormatError:
        return ModelFormatError(problem, path=file.path, tensor=name)

    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise fail("needs dtype, shape and data_offsets in the header")
    type_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(type_name, str) or type_name not in _BITS:
        raise fail(f"has the unknown type {type_name!r}; this version reads {', '.join(READABLE)}")
    if not _are_counts(shape) or len(shape) > _MAX_AXES:
        raise fail(f"has the shape {str(shape)[:80]}, expected at most {_MAX_AXES} whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise fail(f"has the data_offsets {str(offsets)[:80]}, expected [begin, end]")
    first, end = offsets
    if not first <= end <= file.nbytes - begin:
        raise fail(
            f"claims bytes {first} … {end} of {file.nbytes - begin} bytes of data; the file is truncated or damaged"
        )
    num_bits = math.prod(shape) * _BITS[type_name]
    if num_bits != (end - first) * 8:
        raise fail(f"{type_name} {shape} takes {num_bits // 8} bytes, but data_offsets gives {end - first}")
    return StoredTensor(name, type_name, READABLE.get(type_name), tuple(shape), begin + first, file), end - first


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_cover(tensors: Any, file: FileMapping, begin: int) -> None:
    position = begin
    for tensor, nbytes in sorted(tensors, key=lambda item: (item[0].offset, item[1])):
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise ModelFormatError(problem, path=file.path, tensor=tensor.name, offset=tensor.offset)
        position += nbytes
    if position != file.nbytes:
        raise ModelFormatError(
            f"{file.nbytes - position} bytes follow the last tensor", path=file.path, offset=position
        )
