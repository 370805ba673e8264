"""Our own block formats, int{bits}_{block}{kind}: 8, 4, 2 or 1 bits, blocks of 32, 64 or 128 elements.

A block is a f16 scale d, for the kinds z and m one more f16 a, then block · bits / 8 bytes of quants q:

- symmetric (no kind letter): int8 d · q with signed bytes, int4 d · (q − 8), int2 and int1 d · (2q − (2^bits − 1));
- z, zero point: d · (q − a);
- m, minimum: d · q + a.

Quants lie in 8 / bits runs: with block / 2 (4 bits) or block / 4 (2 bits) bytes, byte j holds elements j, j + bytes, …
from its low bits up. Of 1 bit, element j is bit j % 8 of byte j / 8. int8_32, int4_32 and int4_32m are q8_0, q4_0 and
q4_1 byte for byte; int1_128 is GGUF's Q1_0.
"""

from __future__ import annotations

import numpy as np

from ...types import DTYPES, native_name
from .base import BlockFormat, Planes, f16_at, f16_bytes, pack_bits, reciprocal, unpack_bits
from .simple import encode_range, encode_signed, extremes, half_away


class NativeFormat(BlockFormat):
    """One of them. `pack` takes quants and scales that a better quantizer than plain rounding has chosen."""

    def __init__(self, bits: int, block_size: int, kind: str) -> None:
        self.dtype = DTYPES[native_name(bits, block_size, kind)]
        self.bits, self.kind = bits, kind
        self.header_nbytes = 4 if kind else 2
        self.scale_offsets = (0, 2) if kind else (0,)
        self.has_minimums = kind == "m"
        top = (1 << bits) - 1
        if kind == "m":
            self.quant_range = (0, top)
        elif bits < 8 and kind != "z":
            self.quant_range = (-8, 7) if bits == 4 else (-top, top)
        else:  # zero points are anywhere among fewer bits, and of 8 bits usually in the middle
            self.quant_range = (-128, 127) if bits == 8 else (-top, top)

    def pack(self, quants: np.ndarray, scales: np.ndarray, extras: np.ndarray | None = None) -> np.ndarray:
        """Blocks u8 [N, block_nbytes] from stored quants [N, block_size] (0 … 2^bits − 1; int8 symmetric −128 … 127),
        scales f32 [N] and, for z and m, zero points or minimums f32 [N]."""
        header = [f16_bytes(np.ascontiguousarray(scales, np.float32).reshape(-1, 1))]
        if (extras is None) != (not self.kind):
            raise ValueError(f"{self.name} takes {'zero points or minimums' if self.kind else 'scales alone'}")
        if extras is not None:
            header.append(f16_bytes(np.ascontiguousarray(extras, np.float32).reshape(-1, 1)))
        return np.concatenate([*header, self._packed(quants)], axis=1)

    def _packed(self, quants: np.ndarray) -> np.ndarray:
        if self.bits == 8:
            return quants.astype(np.uint8) if self.kind else quants.astype(np.int8).view(np.uint8)
        if self.bits == 1:
            return np.packbits(quants.astype(np.uint8), axis=1, bitorder="little")
        return pack_bits(quants, self.bits, self.block_size * self.bits // 8)

    def stored_quants(self, blocks: np.ndarray) -> np.ndarray:
        """u8 [N, block_nbytes] → the stored quants [N, block_size]: u8, but i8 for int8 symmetric."""
        data = blocks[:, self.header_nbytes :]
        if self.bits == 8:
            return data if self.kind else data.view(np.int8)
        if self.bits == 1:
            return np.unpackbits(data, axis=1, bitorder="little")
        return unpack_bits(data, self.bits, self.block_size * self.bits // 8)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        quants, scales = self.stored_quants(blocks), f16_at(blocks, 0)
        if self.kind == "z":
            return Planes(quants, scales, zeros=f16_at(blocks, 2))
        if self.kind == "m":
            return Planes(quants, scales, minimums=f16_at(blocks, 2))
        if self.bits == 4:
            quants = quants.view(np.int8) - np.int8(8)
        elif self.bits < 4:
            quants = quants.view(np.int8) * np.int8(2) - np.int8((1 << self.bits) - 1)
        return Planes(quants, scales)

    def quant_range_of(self, data: np.ndarray) -> tuple[int, int] | None:
        """None when a zero point is no integer."""
        if self.kind != "z" or not data.size:
            return self.quant_range
        zeros = f16_at(data.reshape(-1, self.block_nbytes), 2)
        if not (np.rint(zeros) == zeros).all():
            return None
        return -int(zeros.max()), (1 << self.bits) - 1 - int(zeros.min())

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        """Round to nearest between the extremes; of one bit, the levels are the means of the two halves instead."""
        if self.kind:
            return self._encode_range(blocks)
        magnitude = np.abs(blocks)
        if self.bits == 8:
            scale = magnitude.max(axis=1, keepdims=True) / np.float32(127)
            return self.pack(half_away(blocks * reciprocal(scale)), scale)
        if self.bits == 4:
            scale, quants = encode_signed(blocks, 4)
            return self.pack(quants, scale)
        if self.bits == 2:
            scale = magnitude.max(axis=1, keepdims=True) / np.float32(3)
            return self.pack(np.clip(np.rint((blocks * reciprocal(scale) + 3) / 2), 0, 3), scale)
        return self.pack(blocks >= 0, magnitude.mean(axis=1, keepdims=True))

    def _encode_range(self, blocks: np.ndarray) -> np.ndarray:
        low, high = _two_means(blocks) if self.bits == 1 else extremes(blocks)
        if self.kind == "m":
            scale, quants = encode_range(blocks, low, high, self.bits)
            return self.pack(quants, scale, low)
        low, high = np.minimum(low, 0), np.maximum(high, 0)  # the zero point then lies within the quants
        top = np.float32((1 << self.bits) - 1)
        scale = f16_at(f16_bytes((high - low) / top), 0)
        zero = f16_at(f16_bytes(-low * reciprocal(scale)), 0)
        quants = np.clip(np.rint(blocks * reciprocal(scale) + zero), 0, top)
        return self.pack(quants, scale, np.clip(zero, 0, top))


def _two_means(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means [N, 1] of the values up to the mean and of those above it."""
    above = blocks > blocks.mean(axis=1, keepdims=True)
    count = above.sum(axis=1, keepdims=True, dtype=np.float32)
    low = np.where(above, 0, blocks).sum(axis=1, keepdims=True) / np.maximum(above.shape[1] - count, 1)
    high = np.where(above, blocks, 0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return low, np.where(count > 0, high, low)
