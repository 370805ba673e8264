"""Block formats: how consecutive weights of a row share a scale. One class per format; `FORMATS` knows them by name.

The byte layouts are those of GGUF (its specification and ggml's block structures), so tensors of a GGUF file are used
as they are. Little-endian throughout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from ..types import Q4_0, Q8_0, DType


class BlockFormat(ABC):
    """`block_size` consecutive elements of a row stored in `block_nbytes` bytes."""

    dtype: ClassVar[DType]

    @property
    def name(self) -> str:
        return self.dtype.name

    @property
    def block_size(self) -> int:
        return self.dtype.block_size

    @property
    def block_nbytes(self) -> int:
        return self.dtype.block_nbytes

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """f32 [..., K] → u8, the last axis in bytes. ValueError unless K is whole blocks and all values are finite."""
        values = np.ascontiguousarray(values, np.float32)
        row_nbytes = self.dtype.row_nbytes(values.shape[-1])
        if not np.isfinite(values).all():
            raise ValueError(f"{self.name} cannot hold NaN or infinities; the values contain some")
        blocks = self._encode(values.reshape(-1, self.block_size))
        return blocks.reshape(*values.shape[:-1], row_nbytes)

    def dequantize(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """u8 of any shape with the right number of bytes → f32 [shape], in elements. ValueError if sizes differ."""
        nbytes = int(np.prod(shape[:-1])) * self.dtype.row_nbytes(shape[-1])
        if data.dtype != np.uint8 or data.size != nbytes:
            raise ValueError(f"{self.name} {shape} needs {nbytes} bytes as uint8, got {data.size} of {data.dtype}")
        with np.errstate(invalid="ignore"):  # a broken scale is the loader's to report, with the tensor's name
            return self._decode(np.ascontiguousarray(data).reshape(-1, self.block_nbytes)).reshape(shape)

    @abstractmethod
    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        """f32 [N, block_size] → u8 [N, block_nbytes]."""

    @abstractmethod
    def _decode(self, blocks: np.ndarray) -> np.ndarray:
        """u8 [N, block_nbytes] → f32 [N, block_size]."""


def _scale_bytes(scale: np.ndarray) -> np.ndarray:
    """f32 [N, 1] → the bytes of its f16 values, u8 [N, 2]."""
    with np.errstate(over="ignore"):
        return scale.astype("<f2").view(np.uint8)


def _scales(blocks: np.ndarray) -> np.ndarray:
    """The f16 scale at the start of each block, as f32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for the scale of an empty block."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


class Q8_0Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, then 32 signed bytes q: value q · d, d = max|x| / 127, rounded half away from zero."""

    dtype = Q8_0

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        scaled = blocks * _reciprocal(scale)
        magnitude = np.abs(scaled)
        whole = np.floor(magnitude)
        rounded = np.sign(scaled) * (whole + (magnitude - whole >= 0.5))
        return np.concatenate([_scale_bytes(scale), rounded.astype(np.int8).view(np.uint8)], axis=1)

    def _decode(self, blocks: np.ndarray) -> np.ndarray:
        return blocks[:, 2:].view(np.int8).astype(np.float32) * _scales(blocks)


class Q4_0Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, then 16 bytes: element j in the low nibble of byte j, j + 16 in the high; value (nibble − 8) · d.

    d is the element of largest magnitude over −8, so that this one is hit exactly, at nibble 0.
    """

    dtype = Q4_0

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
        scale = largest / np.float32(-8)
        nibbles = np.clip(np.trunc(blocks * _reciprocal(scale) + np.float32(8.5)), 0, 15).astype(np.uint8)
        packed = nibbles[:, :16] | nibbles[:, 16:] << np.uint8(4)
        return np.concatenate([_scale_bytes(scale), packed], axis=1)

    def _decode(self, blocks: np.ndarray) -> np.ndarray:
        packed = blocks[:, 2:]
        nibbles = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)
        return (nibbles.astype(np.float32) - np.float32(8)) * _scales(blocks)


FORMATS: dict[str, BlockFormat] = {f.name: f for f in (Q8_0Format(), Q4_0Format())}
