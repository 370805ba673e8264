"""Formats of GGUF that are read by the `gguf` package's decoders, to be repacked when a model is loaded."""

from __future__ import annotations

import numpy as np

from .base import BlockFormat, Planes, dtype_of, f16_at


class ForeignFormat(BlockFormat):
    """A type by the name ggml gives it, in lower case; no scale_offsets: its scales are no whole f16 numbers.

    quant_range: of types whose values are integers times one scale per block; `unit` is then the bytes of a scale of 1
    and where they lie, so that the decoder itself says the integers.
    """

    can_encode = False

    def __init__(
        self,
        name: str,
        scale_offsets: tuple[int, ...],
        quant_range: tuple[int, int] | None = None,
        unit: tuple[int, bytes] = (0, b""),
    ) -> None:
        self.dtype = dtype_of(name)
        self.scale_offsets = scale_offsets
        self.quant_range = quant_range
        self._unit = unit

    def first_bad_block(self, data: np.ndarray) -> int:
        if self.scale_offsets:
            return super().first_bad_block(data)
        values = self.dequantize(data.reshape(-1), (data.size // self.block_nbytes, self.block_size))
        bad = ~np.isfinite(values).all(axis=1)
        return int(np.argmax(bad)) if bad.any() else -1

    def _decode(self, blocks: np.ndarray) -> np.ndarray:
        import gguf

        kind = gguf.GGMLQuantizationType[self.name.upper()]
        return np.asarray(gguf.quants.dequantize(blocks, kind), np.float32).reshape(len(blocks), self.block_size)

    def _unpack(self, blocks: np.ndarray) -> Planes:
        if self.quant_range is None:
            raise ValueError(f"{self.name} is only decoded, its quants and scales are not taken apart")
        offset, unit = self._unit
        scales = self._scales(blocks)
        units = blocks.copy()
        units[:, offset : offset + len(unit)] = np.frombuffer(unit, np.uint8)
        return Planes(self._decode(units).astype(np.int8), scales)

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return f16_at(blocks, self._unit[0])


class Mxfp4Format(ForeignFormat):
    """A byte e, 16 bytes of nibbles as in q4_0: value table[nibble] · 2^(e − 128), the table of integers to ±12."""

    is_exact_in_bf16 = True

    def __init__(self) -> None:
        super().__init__("mxfp4", (), (-12, 12), (0, b"\x80"))

    def quant_range_of(self, data: np.ndarray) -> tuple[int, int] | None:
        """None when a scale is no f16 number."""
        exponents = data.reshape(-1, self.block_nbytes)[:, 0]
        fits = not data.size or (exponents.min() >= 128 - 24 and exponents.max() <= 128 + 15)
        return self.quant_range if fits else None

    def _scales(self, blocks: np.ndarray) -> np.ndarray:
        return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128).astype(np.float32)


_ONE = b"\x00\x3c"  # as f16

FOREIGN: tuple[ForeignFormat, ...] = (
    ForeignFormat("iq2_xxs", (0,)),
    ForeignFormat("iq2_xs", (0,)),
    ForeignFormat("iq2_s", (0,)),
    ForeignFormat("iq3_xxs", (0,)),
    ForeignFormat("iq3_s", (0,)),
    ForeignFormat("iq1_s", (0,)),
    ForeignFormat("iq1_m", ()),
    ForeignFormat("tq1_0", (52,), (-1, 1), (52, _ONE)),
    ForeignFormat("tq2_0", (64,), (-1, 2), (64, _ONE)),
    Mxfp4Format(),
    ForeignFormat("nvfp4", ()),
)
