"""The 4-bit formats of ggml whose levels are unevenly spaced."""

from __future__ import annotations

import numpy as np

from .base import BlockFormat, Planes, dtype_of, f16_at, f16_bytes, pack_bits, reciprocal, unpack_bits
from .k_quants import as_parts
from .search import nearest_level, search_levels, signed_scales

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


class IQ4_NLFormat(BlockFormat):  # noqa: N801 - the format's own name
    """f16 scale d, 16 bytes as in q4_0: value table[nibble] · d with sixteen unevenly spaced table entries."""

    dtype = dtype_of("iq4_nl")
    takes_importance = True
    quant_range = (-127, 113)

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        header = f16_bytes(search_levels(blocks, _IQ4_VALUES, importance)[:, None])
        indices = nearest_level(blocks * reciprocal(f16_at(header, 0)), _IQ4_VALUES)
        return np.concatenate([header, pack_bits(indices, 4, 16)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        return Planes(_IQ4_VALUES[unpack_bits(blocks[:, 2:], 4, 16)], f16_at(blocks, 0))


class IQ4_XSFormat(BlockFormat):  # noqa: N801 - the format's own name
    """256 elements: f16 scale d, high 2 bits of eight scales (u16), low 4 bits (4 bytes), 8 × 16 bytes as in iq4_nl.

    Value table[nibble] · d · (scale − 32), a scale for each 32 elements.
    """

    dtype = dtype_of("iq4_xs")
    takes_importance = True

    def _encode(self, blocks: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        parts = blocks.reshape(len(blocks), 8, 32)
        header, sixth = signed_scales(
            search_levels(parts.reshape(-1, 32), _IQ4_VALUES, as_parts(importance, 32)).reshape(-1, 8), 32
        )
        stored = (f16_at(header, 0) * sixth)[:, :, None]
        indices = nearest_level(parts * reciprocal(stored), _IQ4_VALUES).reshape(len(blocks), 256)
        scales = (sixth + 32).astype(np.uint8)
        high, low = pack_bits(scales >> np.uint8(4), 2, 1), pack_bits(scales & np.uint8(15), 4, 1)
        return np.concatenate([header, high, low, pack_bits(indices, 4, 16)], axis=1)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        high = unpack_bits(blocks[:, 2:4], 2, 1)
        low = unpack_bits(blocks[:, 4:8], 4, 1)
        scales = (low | high << np.uint8(4)).astype(np.float32) - np.float32(32)
        return Planes(_IQ4_VALUES[unpack_bits(blocks[:, 8:], 4, 16)], f16_at(blocks, 0) * scales)
