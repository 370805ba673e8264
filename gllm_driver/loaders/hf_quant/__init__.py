"""Quantized Hugging Face checkpoints: their packed tensors as the matrices they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ModelFormatError
from ...types import DTYPES, DType, Tensor
from ..mapping import FileMapping, StoredTensor
from .arrays import Parts, array
from .config import quantization_of, scheme_of
from .grouped import ROWS, Layout
from .schemes import Rows, Scheme

__all__ = ["PackedTensor", "with_matrices"]

# What else a quantized layer's tensors may be called; they are used or, of no meaning here, left aside.
_PARTS = {"qweight", "qzeros", "scales", "g_idx", "weight", "SCB", "weight_format", "input_scale", "output_scale"}
_PARTS |= {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}


@dataclass(frozen=True)
class PackedTensor:
    """A matrix [N, K] that its file holds in several tensors, converted when it is opened."""

    name: str
    parts: Parts
    scheme: Scheme

    @cached_property
    def _read(self) -> tuple[Layout, Rows]:
        return self.scheme.read(self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._read[0].shape

    @property
    def dtype(self) -> DType:
        return self._read[0].dtype

    @property
    def file(self) -> FileMapping:
        return next(iter(self.parts.tensors.values())).file

    @property
    def path(self) -> Path:
        return self.file.path

    def open(self, readable: Iterable[str]) -> Tensor:
        """The matrix in memory, in blocks of ours or in f16."""
        tensor, (layout, rows) = self.reserve(), self._read
        out: np.ndarray = tensor.owner
        for first in range(0, layout.shape[0], ROWS):
            end = min(first + ROWS, layout.shape[0])
            out[first:end] = layout.pack(np.ascontiguousarray(rows(first, end)), first)
        return tensor

    def reserve(self) -> Tensor:
        """Its description: memory of the right size that nothing was written to."""
        layout = self._read[0]
        N, K = layout.shape
        out = np.empty((N, layout.dtype.row_nbytes(K)), np.uint8)
        return Tensor(out.ctypes.data, layout.shape, layout.dtype, out)


def with_matrices(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], path: Path
) -> Mapping[str, StoredTensor | PackedTensor]:
    """`stored` with the tensors of each quantized layer replaced by its matrix; `path` is that of config.json.

    Raises ModelFormatError for methods that cannot be read, and for shapes and types that do not fit together.
    """
    quantization = quantization_of(config, path)
    if quantization is None:
        return stored
    if quantization["quant_method"] == "gllm":
        return _native(stored, quantization, path)
    scheme = scheme_of(quantization, path)
    layers: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part in _PARTS:
            layers.setdefault(layer, {})[part] = tensor
    found: dict[str, StoredTensor | PackedTensor] = dict(stored)
    for layer, tensors in layers.items():
        if not _is_quantized(tensors, scheme):
            continue
        for part in tensors:
            del found[f"{layer}.{part}"]
        packed = PackedTensor(f"{layer}.weight", Parts(layer, tensors), scheme)
        found[packed.name] = packed
        bias = stored.get(f"{layer}.bias")
        if bias is not None and scheme.part == "qweight" and not array(bias).astype(np.float32).any():
            del found[f"{layer}.bias"]  # GPTQ's writers give every layer one, of zeros where the model has none
    return found


def _is_quantized(tensors: Mapping[str, StoredTensor], scheme: Scheme) -> bool:
    if scheme.part == "weight":
        return "weight" in tensors and tensors["weight"].type_name == "I8"
    return not tensors.keys() <= {"weight", "input_scale", "output_scale"}  # the latter two: of activations, unused


def _native(stored: Mapping[str, StoredTensor], section: Mapping[str, Any], path: Path) -> Mapping[str, StoredTensor]:
    """Matrices that `quant.native_file` wrote: bytes under their usual names, their types in config.json."""
    types = section.get("tensors")
    if section.get("version") != 1 or not isinstance(types, Mapping):
        raise ModelFormatError("quantization_config of gllm needs version 1 and tensors (name → type)", path=path)
    found = dict(stored)
    for name, type_name in types.items():
        dtype = DTYPES.get(type_name) if isinstance(type_name, str) else None
        if dtype is None or not dtype.is_quantized:
            raise ModelFormatError(
                f"quantization_config gives it the unknown type {type_name!r}", path=path, tensor=name
            )
        if name not in stored:
            raise ModelFormatError("is named in quantization_config but is not there", path=path, tensor=name)
        raw = stored[name]
        if raw.type_name != "U8" or len(raw.shape) != 2 or raw.shape[1] % dtype.block_nbytes:
            raise ModelFormatError(
                f"is {raw.type_name} {list(raw.shape)}, no rows of {dtype.name} blocks ({dtype.block_nbytes} bytes)",
                path=raw.path,
                tensor=name,
            )
        shape = raw.shape[0], raw.shape[1] // dtype.block_nbytes * dtype.block_size
        found[name] = StoredTensor(name, dtype.name, dtype, shape, raw.offset, raw.file)
    return found
