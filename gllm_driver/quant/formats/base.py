"""What every block format has: its row in the type table, decode and, for most, encode."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from ...types import DTYPES, DType

_TOO_LARGE = 2.0**30  # beyond what any format's f16 scales reach


@dataclass(frozen=True)
class Planes:
    """Blocks taken apart: value = scale · (quant − zero) + minimum, each scale serving block_size / G elements in turn.

    This is how blocks lie on devices that keep quants and scales apart, and what quantizers choose.
    """

    quants: np.ndarray  # [N, block_size] i8 or u8
    scales: np.ndarray  # [N, G] f32
    minimums: np.ndarray | None = None  # [N, G] f32, absent: 0
    zeros: np.ndarray | None = None  # [N, G] f32, absent: 0

    def values(self) -> np.ndarray:
        """f32 [N, block_size], rounded after the product and after the sum, as ggml's own decoders do."""
        count, groups = self.scales.shape
        q = self.quants.astype(np.float32).reshape(count, groups, -1)
        if self.zeros is not None:
            q = q - self.zeros[:, :, None]
        x = self.scales[:, :, None] * q
        if self.minimums is not None:
            x = x + self.minimums[:, :, None]
        return x.reshape(count, -1)


class BlockFormat(ABC):
    """`block_size` consecutive elements of a row stored in `block_nbytes` bytes.

    scale_offsets: bytes from the start of a block to each of its f16 numbers; a block whose f16 numbers are finite has
    only finite values. A block may also hold scales that are no f16; those are always finite.
    """

    dtype: DType
    scale_offsets: tuple[int, ...] = (0,)
    can_encode: bool = True
    has_minimums: bool = False
    takes_importance: bool = False  # `quantize` can weigh its errors
    is_exact_in_bf16: bool = False  # every value is a bf16 number, while f16 may lack its exponent
    # Smallest and largest quant − zero, for formats whose scales and minimums are f16 numbers as they are stored: a
    # format of more bits holds the same values exactly. None: scales are products that f16 would round.
    quant_range: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.dtype.name

    @property
    def block_size(self) -> int:
        return self.dtype.block_size

    @property
    def block_nbytes(self) -> int:
        return self.dtype.block_nbytes

    def quantize(self, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """f32 [..., K] → u8, the last axis in bytes. importance f32 [K]: what a squared error costs in each column, for
        formats that take it.

        ValueError unless K is whole blocks, all values are finite and their scales fit in f16, and for formats that
        are only read.
        """
        values = np.ascontiguousarray(values, np.float32)
        row_nbytes = self.dtype.row_nbytes(values.shape[-1])
        if not self.can_encode:
            raise ValueError(f"{self.name} is only read, not written")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.name} cannot hold NaN or infinities; the values contain some")
        largest = np.abs(values).max(initial=0)
        blocks = self._weighed(values, importance) if largest < _TOO_LARGE else None
        if blocks is None or self.first_bad_block(blocks) >= 0:
            raise ValueError(f"{self.name} cannot hold values up to {largest:.3g}: their scales overflow f16")
        return blocks.reshape(*values.shape[:-1], row_nbytes)

    def dequantize(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """u8 of any shape with the right number of bytes → f32 [shape], in elements. ValueError if sizes differ."""
        with np.errstate(invalid="ignore", over="ignore"):  # a broken scale is the loader's to report, with a name
            return self._decode(self._blocks(data, shape)).reshape(shape)

    def planes(self, data: np.ndarray, shape: tuple[int, ...]) -> Planes:
        """Quants and scales of u8 data, N blocks in order. ValueError as `dequantize`, and for types without planes."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self._unpack(self._blocks(data, shape))

    def first_bad_block(self, data: np.ndarray) -> int:
        """Index of the first block with a scale that is NaN or infinite in u8 data of whole blocks; −1: none has."""
        blocks = data.reshape(-1, self.block_nbytes)
        bad = np.zeros(len(blocks), np.bool_)
        for offset in self.scale_offsets:
            bad |= blocks[:, offset + 1] & 0x7C == 0x7C  # all exponent bits, which lie in the high byte
        return int(np.argmax(bad)) if bad.any() else -1

    def quant_range_of(self, data: np.ndarray) -> tuple[int, int] | None:
        """`quant_range` of these blocks (u8, whole blocks), where it depends on them."""
        return self.quant_range

    def _blocks(self, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = int(np.prod(shape[:-1])) * self.dtype.row_nbytes(shape[-1])
        if data.dtype != np.uint8 or data.size != nbytes:
            raise ValueError(f"{self.name} {shape} needs {nbytes} bytes as uint8, got {data.size} of {data.dtype}")
        return np.ascontiguousarray(data).reshape(-1, self.block_nbytes)

    def _weighed(self, values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        blocks = values.reshape(-1, self.block_size)
        if importance is None or not self.takes_importance:
            return self._encode(blocks)
        tiled = np.broadcast_to(importance, values.shape).reshape(blocks.shape)
        return self._encode(blocks, tiled)  # type: ignore[call-arg]

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        """f32 [N, block_size] → u8 [N, block_nbytes]."""
        raise NotImplementedError(f"{self.name} sets can_encode to say that it is only read")

    def _decode(self, blocks: np.ndarray) -> np.ndarray:
        """u8 [N, block_nbytes] → f32 [N, block_size]."""
        return self._unpack(blocks).values()

    @abstractmethod
    def _unpack(self, blocks: np.ndarray) -> Planes:
        """u8 [N, block_nbytes] → the N blocks taken apart."""


def dtype_of(name: str) -> DType:
    """The row of the type table."""
    return DTYPES[name]


def f16_bytes(scale: np.ndarray) -> np.ndarray:
    """f32 [N, 1] → the bytes of its f16 values, u8 [N, 2]."""
    with np.errstate(over="ignore"):
        return scale.astype("<f2").view(np.uint8)


def f16_at(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The f16 number at a byte offset of each block, as f32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def reciprocal(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for the scale of an empty block."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def unpack_bits(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """u8 [N, B] → u8 [N, 8 / bits · B]: of every `width` bytes first all lowest fields, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = (packed.reshape(len(packed), -1, 1, width) >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(len(packed), -1)


def pack_bits(fields: np.ndarray, bits: int, width: int) -> np.ndarray:
    """The inverse of `unpack_bits`."""
    per_byte = 8 // bits
    parts = fields.astype(np.uint8).reshape(len(fields), -1, per_byte, width)
    packed = parts[:, :, 0].copy()
    for i in range(1, per_byte):
        packed |= parts[:, :, i] << np.uint8(bits * i)
    return packed.reshape(len(fields), -1)
