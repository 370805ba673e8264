"""The K formats of ggml: 256 elements, 8 or 16 sub-blocks with small integer scales times one f16 scale.

Layouts: ggml's block structures (ggml-common.h). The encoders search scales by weighted least squares (search.py).
"""

from __future__ import annotations

import numpy as np

from .base import BlockFormat, Planes, dtype_of, f16_at, f16_bytes, pack_bits, reciprocal, unpack_bits
from .search import search_minimum, search_signed, signed_scales


def as_parts(importance: np.ndarray | None, part: int) -> np.ndarray | None:
    """[N, block_size] → one row for each sub-block of `part` elements."""
    return None if importance is None else importance.reshape(-1, part)


def _encode_with_minimums(
    blocks: np.ndarray, importance: np.ndarray | None, part: int, bits: int, scale_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(d and dmin as bytes [N, 4], integer scales and minimums [N, G], quants u8 [N, 256]); sub-blocks of `part`."""
    parts = blocks.reshape(len(blocks), -1, part)
    found = search_minimum(parts.reshape(-1, part), bits, as_parts(importance, part))
    top = np.float32((1 << scale_bits) - 1)
    header, integers, stored = [], [], []
    for values in found:
        values = values.reshape(len(blocks), -1)
        number = f16_bytes(values.max(axis=1, keepdims=True) / top)
        header.append(number)
        integers.append(np.clip(np.rint(values * reciprocal(f16_at(number, 0))), 0, top))
        stored.append((f16_at(number, 0) * integers[-1])[:, :, None])
    quants = np.clip(np.rint((parts + stored[1]) * reciprocal(stored[0])), 0, (1 << bits) - 1)
    quants = quants.astype(np.uint8).reshape(len(blocks), 256)
    return np.concatenate(header, axis=1), integers[0].astype(np.uint8), integers[1].astype(np.uint8), quants


class Q2_KFormat(BlockFormat):  # noqa: N801 - the format's own name
    """16 bytes (low nibble scale, high nibble minimum), 64 bytes of 2-bit quants, f16 d, f16 dmin; 16 sub-blocks of 16.

    Value d · scale · quant − dmin · minimum. Each 32 bytes of quants hold 128 elements, 32 in each pair of bits.
    """

    dtype = dtype_of("q2_k")
    takes_importance = True
    has_minimums = True
    scale_offsets = (80, 82)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        header, scales, minimums, quants = _encode_with_minimums(blocks, importance, 16, 2, 4)
        return np.concatenate([scales | minimums << np.uint8(4), pack_bits(quants, 2, 32), header], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        scales = (blocks[:, :16] & np.uint8(15)).astype(np.float32)
        minimums = (blocks[:, :16] >> np.uint8(4)).astype(np.float32)
        quants = unpack_bits(blocks[:, 16:80], 2, 32)
        return Planes(quants, f16_at(blocks, 80) * scales, -(f16_at(blocks, 82) * minimums))


class Q3_KFormat(BlockFormat):  # noqa: N801 - the format's own name
    """32 bytes of third bits, 64 bytes of 2-bit quants as in q2_k, 12 bytes of sixteen 6-bit scales, f16 d.

    Value d · (scale − 32) · (quant − 4), a scale for each 16 elements. Element j: bit j / 32 of byte j % 32.
    """

    dtype = dtype_of("q3_k")
    takes_importance = True
    scale_offsets = (108,)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        parts = blocks.reshape(len(blocks), 16, 16)
        tail, sixth = signed_scales(
            search_signed(parts.reshape(-1, 16), 4, as_parts(importance, 16)).reshape(-1, 16), 32
        )
        stored = (f16_at(tail, 0) * sixth)[:, :, None]
        quants = np.clip(np.rint(parts * reciprocal(stored)), -4, 3) + np.float32(4)
        quants = quants.astype(np.uint8).reshape(len(blocks), 256)
        third, pairs = pack_bits(quants >> np.uint8(2), 1, 32), pack_bits(quants & np.uint8(3), 2, 32)
        scales = (sixth + 32).astype(np.uint8)
        low, high = pack_bits(scales & np.uint8(15), 4, 8), pack_bits(scales >> np.uint8(4), 2, 4)
        return np.concatenate([third, pairs, low, high, tail], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        low = unpack_bits(blocks[:, 96:104], 4, 8)
        high = unpack_bits(blocks[:, 104:108], 2, 4)
        scales = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
        quants = unpack_bits(blocks[:, 32:96], 2, 32) | unpack_bits(blocks[:, :32], 1, 32) << np.uint8(2)
        return Planes(quants.view(np.int8) - np.int8(4), f16_at(blocks, 108) * scales)


def unpack_six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and eight 6-bit minimums of q4_k and q5_k: u8 [N, 12] → u8 [N, 8] each.

    Bytes 0 to 3 hold scales 0 to 3, 4 to 7 minimums 0 to 3; bytes 8 to 11 the low nibbles of scales and minimums 4 to
    7, whose two high bits are those of the first eight bytes.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minimums = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minimums


def pack_six_bits(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_six_bits`."""
    s, m = scales.astype(np.uint8), minimums.astype(np.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4 << 6)
    second = m[:, :4] | (m[:, 4:] >> 4 << 6)
    third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


class Q4_KFormat(BlockFormat):  # noqa: N801 - the format's own name
    """f16 d, f16 dmin, 12 bytes of eight 6-bit scales and minimums, 128 bytes of nibbles; 8 sub-blocks of 32.

    Value d · scale · quant − dmin · minimum. Each 32 bytes hold two sub-blocks, low nibbles first.
    """

    dtype = dtype_of("q4_k")
    takes_importance = True
    has_minimums = True
    scale_offsets = (0, 2)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        header, scales, minimums, quants = _encode_with_minimums(blocks, importance, 32, 4, 6)
        return np.concatenate([header, pack_six_bits(scales, minimums), pack_bits(quants, 4, 32)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        scales, minimums = unpack_six_bits(blocks[:, 4:16])
        quants = unpack_bits(blocks[:, 16:], 4, 32)
        return Planes(quants, f16_at(blocks, 0) * scales, -(f16_at(blocks, 2) * minimums))


class Q5_KFormat(BlockFormat):  # noqa: N801 - the format's own name
    """As q4_k, with 32 bytes of fifth bits before the nibbles: bit s of byte j is that of element j of sub-block s."""

    dtype = dtype_of("q5_k")
    takes_importance = True
    has_minimums = True
    scale_offsets = (0, 2)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        header, scales, minimums, quants = _encode_with_minimums(blocks, importance, 32, 5, 6)
        fifth, low = pack_bits(quants >> np.uint8(4), 1, 32), pack_bits(quants & np.uint8(15), 4, 32)
        return np.concatenate([header, pack_six_bits(scales, minimums), fifth, low], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        scales, minimums = unpack_six_bits(blocks[:, 4:16])
        quants = unpack_bits(blocks[:, 48:], 4, 32) | unpack_bits(blocks[:, 16:48], 1, 32) << np.uint8(4)
        return Planes(quants, f16_at(blocks, 0) * scales, -(f16_at(blocks, 2) * minimums))


class Q6_KFormat(BlockFormat):  # noqa: N801 - the format's own name
    """128 bytes of low nibbles, 64 of high bit pairs, 16 signed scales, f16 d: value d · scale · (quant − 32).

    A scale for each 16 elements. Each 64 bytes of nibbles and 32 of pairs hold 128 elements.
    """

    dtype = dtype_of("q6_k")
    takes_importance = True
    scale_offsets = (208,)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        parts = blocks.reshape(len(blocks), 16, 16)
        scales = search_signed(parts.reshape(-1, 16), 32, as_parts(importance, 16)).reshape(-1, 16)
        tail, eighth = signed_scales(scales, 128)
        stored = (f16_at(tail, 0) * eighth)[:, :, None]
        quants = np.clip(np.rint(parts * reciprocal(stored)), -32, 31) + np.float32(32)
        quants = quants.astype(np.uint8).reshape(len(blocks), 256)
        low, high = pack_bits(quants & np.uint8(15), 4, 64), pack_bits(quants >> np.uint8(4), 2, 32)
        return np.concatenate([low, high, eighth.astype(np.int8).view(np.uint8), tail], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
        quants = unpack_bits(blocks[:, :128], 4, 64) | unpack_bits(blocks[:, 128:192], 2, 32) << np.uint8(4)
        return Planes(quants.view(np.int8) - np.int8(32), f16_at(blocks, 208) * scales)
