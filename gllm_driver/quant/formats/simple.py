"""The older formats of ggml: 32 elements, one f16 scale and for some a f16 minimum. Rounding is the reference's own."""

from __future__ import annotations

import numpy as np

from .base import (
    BlockFormat,
    Planes,
    dtype_of,
    f16_at,
    f16_bytes,
    pack_bits,
    reciprocal,
    unpack_bits,
)


class Q8_0Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, then 32 signed bytes q: value q · d, d = max|x| / 127, rounded half away from zero."""

    dtype = dtype_of("q8_0")
    quant_range = (-128, 127)

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        quants = half_away(blocks * reciprocal(scale)).astype(np.int8)
        return np.concatenate([f16_bytes(scale), quants.view(np.uint8)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(blocks[:, 2:].view(np.int8), f16_at(blocks, 0))


def half_away(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest integer, halves away from zero."""
    magnitude = np.abs(x)
    whole = np.floor(magnitude)
    rounded: np.ndarray = np.sign(x) * (whole + (magnitude - whole >= 0.5))
    return rounded


def signed_scale(blocks: np.ndarray, levels: int) -> np.ndarray:
    """The element of largest magnitude over −levels, so that this one is hit exactly, at the lowest quant: [N, 1]."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    return largest / np.float32(-levels)


def encode_signed(blocks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale f32 [N, 1], quants u8 [N, block]) of value (quant − 2^(bits − 1)) · scale."""
    half = 1 << (bits - 1)
    scale = signed_scale(blocks, half)
    quants = np.trunc(blocks * reciprocal(scale) + np.float32(half + 0.5))
    return scale, np.clip(quants, 0, 2 * half - 1).astype(np.uint8)


def extremes(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each block, [N, 1]."""
    return blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)


def encode_range(blocks: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale f32 [N, 1], quants u8 [N, block]) of value quant · scale + low, the last quant at `high`."""
    top = (1 << bits) - 1
    scale = (high - low) / np.float32(top)
    quants = np.trunc((blocks - low) * reciprocal(scale) + np.float32(0.5))
    return scale, np.clip(quants, 0, top).astype(np.uint8)


class Q4_0Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, then 16 bytes: element j in the low nibble of byte j, j + 16 in the high; value (nibble − 8) · d."""

    dtype = dtype_of("q4_0")
    quant_range = (-8, 7)

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        scale, quants = encode_signed(blocks, 4)
        return np.concatenate([f16_bytes(scale), pack_bits(quants, 4, 16)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(unpack_bits(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8), f16_at(blocks, 0))


class Q4_1Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, f16 minimum m, 16 bytes as in q4_0: value nibble · d + m."""

    dtype = dtype_of("q4_1")
    quant_range = (0, 15)
    has_minimums = True
    scale_offsets = (0, 2)

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        low, high = extremes(blocks)
        scale, quants = encode_range(blocks, low, high, 4)
        return np.concatenate([f16_bytes(scale), f16_bytes(low), pack_bits(quants, 4, 16)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(unpack_bits(blocks[:, 4:], 4, 16), f16_at(blocks, 0), f16_at(blocks, 2))


def _five_bits(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Bit j of four bytes above nibble j of sixteen: u8 [N, 32]."""
    return unpack_bits(low, 4, 16) | np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _five_bits_packed(quants: np.ndarray) -> np.ndarray:
    high = np.packbits(quants >> np.uint8(4), axis=1, bitorder="little")
    return np.concatenate([high, pack_bits(quants & np.uint8(15), 4, 16)], axis=1)


class Q5_0Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, 4 bytes of fifth bits (element j: bit j), 16 bytes as in q4_0: value (quant − 16) · d."""

    dtype = dtype_of("q5_0")
    quant_range = (-16, 15)

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        scale, quants = encode_signed(blocks, 5)
        return self.pack(quants, scale)

    def pack(self, quants: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Blocks u8 [N, 22] from quants 0 … 31 [N, 32] and scales f32 [N, 1]."""
        return np.concatenate([f16_bytes(scales), _five_bits_packed(quants)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(_five_bits(blocks[:, 2:6], blocks[:, 6:]).view(np.int8) - np.int8(16), f16_at(blocks, 0))


class Q5_1Format(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, f16 minimum m, then as in q5_0: value quant · d + m."""

    dtype = dtype_of("q5_1")
    quant_range = (0, 31)
    has_minimums = True
    scale_offsets = (0, 2)

    def _encode(self, blocks: np.ndarray) -> np.ndarray:
        low, high = extremes(blocks)
        scale, quants = encode_range(blocks, low, high, 5)
        return self.pack(quants, scale, low)

    def pack(self, quants: np.ndarray, scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
        """Blocks u8 [N, 24] from quants 0 … 31 [N, 32], scales and minimums f32 [N, 1]."""
        return np.concatenate([f16_bytes(scales), f16_bytes(minimums), _five_bits_packed(quants)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(_five_bits(blocks[:, 4:8], blocks[:, 8:]), f16_at(blocks, 0), f16_at(blocks, 2))
