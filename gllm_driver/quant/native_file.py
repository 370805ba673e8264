"""Writing safetensors files whose matrices are blocks: bytes under their usual names, their types in config.json.

A matrix [N, K] of type T is a U8 tensor [N, T.row_nbytes(K)]; config.json says
`"quantization_config": {"quant_method": "gllm", "version": 1, "tensors": {name: type}}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..types import DType
from .tensor_file import TensorFileWriter, Tensors, nbytes_of

_FLOAT_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def quantization_section(tensors: Mapping[str, DType]) -> dict[str, Any]:
    """What config.json must say for tensors of these types, floats among them."""
    types = {name: dtype.name for name, dtype in tensors.items() if dtype.is_quantized}
    return {"quant_method": "gllm", "version": 1, "tensors": types}


class NativeFileWriter(TensorFileWriter):
    """Writes one .safetensors file; it appears under its name when all tensors are there, and not at all otherwise."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset, nbytes = 0, nbytes_of(tensors)
        for name, (dtype, shape) in tensors.items():
            type_name = _FLOAT_NAMES.get(dtype.name, "U8")
            stored = [*shape[:-1], dtype.row_nbytes(shape[-1])] if dtype.is_quantized else list(shape)
            end = offset + nbytes[name]
            header[name] = {"dtype": type_name, "shape": stored, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        super().__init__(path, len(text).to_bytes(8, "little") + text, tensors)
