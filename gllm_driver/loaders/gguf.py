"""GGUF files, versions 2 and 3, memory-mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md — magic, version, counts, key-value pairs, tensor
descriptions, padding, tensor data; all little-endian. Every count and length is compared with the bytes left in the
file before anything of that size is made, so a damaged file costs an error and nothing else.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFormatError
from .ggml_types import READABLE, TENSOR_TYPES
from .mapping import FileMapping, StoredTensor

_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMPY_ARRAYS = {i: np.dtype(s.format) for i, s in _SCALARS.items()}

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MIN_KV_NBYTES = 8 + 4 + 1  # key length, type, the smallest value
_MIN_TENSOR_NBYTES = 8 + 4 + 4 + 8  # name length, axis count, type, offset
_MAX_AXES = 4
_MAX_ALIGNMENT = 1 << 20
# The parts of a split model: prefix, number from 1, number of parts.
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFile:
    """`metadata` is the file's key-value pairs: str, int, float, bool, list[str], or a numpy array [n]. Bytes of a
    string that are no UTF-8 stay recoverable (`value.encode("utf-8", "surrogateescape")`). `pairs` says where each pair
    lies in `file`, (first byte, end), so that it can be copied as it is."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    pairs: dict[str, tuple[int, int]]
    file: FileMapping

    def pair(self, key: str) -> bytes:
        """The bytes of a key-value pair."""
        begin, end = self.pairs[key]
        return self.file.buffer[begin:end]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of one GGUF file, or of all parts when it is the first of a split model (…-00001-of-0000N.gguf).

    Raises ModelFormatError for anything that is not a whole GGUF v2/v3 file.
    """
    first = _read_part(path)
    num_parts = first.metadata.get("split.count", 1)
    if type(num_parts) is not int or num_parts <= 1:
        return first
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != num_parts:
        raise ModelFormatError(
            f"is part of a model split in {num_parts}, but is not named …-00001-of-{num_parts:05}.gguf", path=path
        )
    if int(match[2]) != 1:
        raise ModelFormatError(
            f"is part {match[2]} of {num_parts}; open {match[1]}-00001-of-{match[3]}.gguf", path=path
        )
    tensors = dict(first.tensors)
    for number in range(2, num_parts + 1):
        part_path = path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf")
        part = _read_part(part_path)
        if part.metadata.get("split.no") != number - 1 or part.metadata.get("split.count") != num_parts:
            raise ModelFormatError(f"does not say that it is part {number} of {num_parts}", path=part_path)
        if duplicates := tensors.keys() & part.tensors.keys():
            raise ModelFormatError("is in two parts of the split model", path=part_path, tensor=min(duplicates))
        tensors |= part.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ModelFormatError(f"the {num_parts} parts hold {len(tensors)} tensors, expected {expected}", path=path)
    return GgufFile(first.metadata, tensors, first.pairs, first.file)


def _read_part(path: Path) -> GgufFile:
    file = FileMapping(path)
    cursor = _Cursor(file)
    if file.buffer[:4] != b"GGUF":
        raise ModelFormatError("is not a GGUF file (it does not begin with the bytes GGUF)", path=path, offset=0)
    cursor.position = 4
    version = cursor.u32()
    if version & 0xFFFF == 0 and version:
        raise ModelFormatError("is a big-endian GGUF file; only little-endian files are supported", path=path, offset=4)
    if version not in (2, 3):
        raise ModelFormatError(f"is GGUF version {version}; versions 2 and 3 are supported", path=path, offset=4)
    num_tensors = cursor.count("tensors", _MIN_TENSOR_NBYTES)
    num_pairs = cursor.count("key-value pairs", _MIN_KV_NBYTES)

    metadata: dict[str, Any] = {}
    pairs: dict[str, tuple[int, int]] = {}
    for _ in range(num_pairs):
        start = cursor.position
        key = cursor.name("a key")
        if key in metadata:
            raise ModelFormatError(f"the key {key!r} occurs twice", path=path, offset=start)
        metadata[key] = cursor.value(key)
        pairs[key] = start, cursor.position

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelFormatError(f"general.alignment must be a power of two, got {str(alignment)[:40]}", path=path)
    described: dict[str, tuple[int, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        start = cursor.position
        name = cursor.name("a tensor name")
        if name in described:
            raise ModelFormatError("is described twice", path=path, tensor=name, offset=start)
        described[name] = cursor.tensor(name)
    data_begin = -(-cursor.position // alignment) * alignment

    tensors: dict[str, StoredTensor] = {}
    for name, (type_id, shape, offset) in described.items():
        if offset % alignment:
            raise ModelFormatError(
                f"its data offset is no multiple of {alignment}", path=path, tensor=name, offset=offset
            )
        if type_id not in TENSOR_TYPES:
            raise ModelFormatError(
                f"has the unknown ggml type {type_id}; readable: {', '.join(READABLE)}", path=path, tensor=name
            )
        type_name, dtype = TENSOR_TYPES[type_id]
        tensors[name] = StoredTensor(name, type_name, dtype, shape, data_begin + offset, file)
    _check_no_overlap(tensors, file)
    return GgufFile(metadata, tensors, pairs, file)


def _check_no_overlap(tensors: dict[str, StoredTensor], file: FileMapping) -> None:
    """Every tensor lies in the file and ends before the next one begins. Types we cannot size count as one byte."""
    previous: tuple[int, str] = (0, "")
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        nbytes = 1
        if tensor.dtype is not None:
            nbytes = -(-math.prod(tensor.shape) // tensor.dtype.block_size) * tensor.dtype.block_nbytes
        end = tensor.offset + nbytes
        if end > file.nbytes:
            raise ModelFormatError(
                f"{tensor.type_name} {list(tensor.shape)} ends at byte {end} but the file at byte {file.nbytes}; "
                "it is truncated or damaged, fetch it again",
                path=file.path,
                tensor=tensor.name,
                offset=tensor.offset,
            )
        if tensor.offset < previous[0]:
            problem = f"begins inside the tensor {previous[1]!r}"
            raise ModelFormatError(problem, path=file.path, tensor=tensor.name, offset=tensor.offset)
        previous = (end, tensor.name)


class _Cursor:
    """Reads forward through a mapped file; a read that would pass the end is a ModelFormatError."""

    def __init__(self, file: FileMapping) -> None:
        self.file = file
        self.buffer = file.buffer
        self.end = file.nbytes
        self.position = 0

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they begin."""
        start = self.position
        if nbytes > self.end - start:
            raise ModelFormatError(
                f"{what} needs {nbytes} bytes, {self.end - start} are left; the file is truncated or damaged",
                path=self.file.path,
                offset=start,
            )
        self.position = start + nbytes
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, "a number"))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, "a number"))[0])

    def count(self, what: str, min_nbytes: int) -> int:
        """A number of things to come, each at least `min_nbytes` long, so no larger than what is left allows."""
        start = self.position
        count = self.u64()
        if count > (self.end - self.position) // min_nbytes:
            raise ModelFormatError(
                f"claims {count} {what}, more than the file can hold", path=self.file.path, offset=start
            )
        return count

    def string(self, what: str) -> bytes:
        nbytes = self.u64()
        start = self.take(nbytes, what)
        return self.buffer[start : start + nbytes]

    def name(self, what: str) -> str:
        start = self.position
        try:
            return self.string(what).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"{what} is not UTF-8", path=self.file.path, offset=start) from None

    def value(self, key: str) -> Any:
        start = self.position
        type_id = self.u32()
        if type_id == _STRING:
            return self.string(f"the value of {key}").decode("utf-8", "surrogateescape")
        if type_id == _ARRAY:
            return self.array(key)
        if type_id in _SCALARS:
            scalar = _SCALARS[type_id]
            return scalar.unpack_from(self.buffer, self.take(scalar.size, f"the value of {key}"))[0]
        raise ModelFormatError(
            f"the key {key!r} has the unknown value type {type_id}", path=self.file.path, offset=start
        )

    def array(self, key: str) -> Any:
        start = self.position
        type_id = self.u32()
        if type_id == _STRING:
            return self.strings(key, self.count(f"strings in {key}", 8))
        if type_id not in _NUMPY_ARRAYS:
            raise ModelFormatError(f"the key {key!r} is an array of type {type_id}", path=self.file.path, offset=start)
        dtype = _NUMPY_ARRAYS[type_id]
        count = self.count(f"values in {key}", dtype.itemsize)
        first = self.take(count * dtype.itemsize, key)
        raw = self.file.data[first : self.position]
        return raw != 0 if type_id == _BOOL else raw.copy().view(dtype)

    def strings(self, key: str, count: int) -> list[str]:
        # The hot loop of loading: vocabularies have 150,000 strings and more. So no method calls in it; the slice of a
        # mapping stops at its end, which a short result shows.
        buffer, position, unpack = self.buffer, self.position, _U64.unpack_from
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(buffer, position)[0]
                append(buffer[begin:position].decode("utf-8", "surrogateescape"))
        except (struct.error, OverflowError):
            position = self.end + 1
        if position > self.end:
            raise ModelFormatError(
                f"the strings of {key} run past the end; the file is truncated or damaged",
                path=self.file.path,
                offset=self.position,
            )
        self.position = position
        return result

    def tensor(self, name: str) -> tuple[int, tuple[int, ...], int]:
        """Type id, shape (row-major: GGUF lists the fastest axis first) and offset into the data of the next tensor."""
        num_axes = self.u32()
        if num_axes > _MAX_AXES:
            raise ModelFormatError(
                f"has {num_axes} axes, at most {_MAX_AXES} are possible", path=self.file.path, tensor=name
            )
        shape = tuple(self.u64() for _ in range(num_axes))[::-1]
        if any(not 1 <= n < 2**63 for n in shape):
            raise ModelFormatError(f"has the shape {list(shape)}", path=self.file.path, tensor=name)
        return self.u32(), shape, self.u64()
