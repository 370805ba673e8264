"""A matrix quantized in groups along its rows, as blocks of ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...quant.formats import NATIVE_FORMATS
from ...types import BF16, DTYPES, F16, NATIVE_BLOCK_SIZES, DType, native_name

ROWS = 256  # converted at a time: the rest stays packed


@dataclass(frozen=True)
class Layout:
    """What is known of a matrix [N, K] before its quants are unpacked: value = scale · (quant − zero)."""

    shape: tuple[int, int]
    bits: int  # 2, 3, 4 or 8
    scales: np.ndarray  # [N, G] f32
    zeros: np.ndarray | None  # [N, G] i32; None: half of the range
    groups: np.ndarray | None = None  # [K] group of each column where they are not runs of K / G

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    @cached_property
    def block_size(self) -> int | None:
        """The largest block that no group border cuts; None: there is none, or columns are permuted."""
        count = self.scales.shape[1]
        if self.groups is not None or self.shape[1] % count or not self._scales_fit:
            return None
        group = self.shape[1] // count
        return next((b for b in sorted(NATIVE_BLOCK_SIZES, reverse=True) if group % b == 0), None)

    @cached_property
    def _scales_fit(self) -> bool:
        """Whether scales in f16 are as good as values in f16 would be."""
        with np.errstate(over="ignore"):
            off = np.abs(self.scales.astype(np.float16).astype(np.float32) - self.scales)
        return bool((off <= np.abs(self.scales) * 2.0**-11).all())

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether quant − zero always fits a signed integer of the stored width."""
        if self.zeros is None:
            return self.bits > 2
        low, high = int(self.zeros.min()), int(self.zeros.max())
        top, half = (1 << self.bits) - 1, 1 << (self._stored_bits - 1)
        return self._stored_bits > 2 and high <= half and top - low <= half - 1

    @property
    def _stored_bits(self) -> int:
        return 4 if self.bits == 3 else self.bits

    @cached_property
    def dtype(self) -> DType:
        """The native format that holds the same values, else f16, or bf16 where f16 overflows."""
        if self.block_size is not None:
            return DTYPES[native_name(self._stored_bits, self.block_size, "" if self.is_symmetric else "z")]
        largest = np.abs(self.scales).max(initial=0) * ((1 << self.bits) + abs(self._extreme_zero))
        return F16 if largest <= 65504 else BF16

    @property
    def _extreme_zero(self) -> int:
        return self.half if self.zeros is None else int(np.abs(self.zeros).max(initial=0))

    def pack(self, quants: np.ndarray, first: int) -> np.ndarray:
        """u8 [rows, row_nbytes] of u8 quants [rows, K] that begin at row `first`."""
        rows = slice(first, first + len(quants))
        scales = self.scales[rows]
        zeros = np.full(scales.shape, self.half, np.int32) if self.zeros is None else self.zeros[rows]
        if self.block_size is None:
            return self._floats(quants, scales, zeros)
        repeats = self.shape[1] // scales.shape[1] // self.block_size
        scales = np.repeat(scales, repeats, axis=1).reshape(-1, 1)
        zeros = np.repeat(zeros, repeats, axis=1).reshape(-1, 1)
        format = NATIVE_FORMATS[self.dtype.name]
        blocks = quants.reshape(-1, self.block_size)
        if not self.is_symmetric:
            return format.pack(blocks, scales, zeros.astype(np.float32)).reshape(len(quants), -1)
        signed = blocks.astype(np.int16) - zeros.astype(np.int16)
        return format.pack(signed + (8 if self._stored_bits == 4 else 0), scales).reshape(len(quants), -1)

    def _floats(self, quants: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        columns = self.groups
        if columns is None:
            columns = np.arange(self.shape[1]) * scales.shape[1] // self.shape[1]
        values = (quants.astype(np.float32) - zeros[:, columns]) * scales[:, columns]
        if self.dtype is BF16:
            import ml_dtypes

            return values.astype(ml_dtypes.bfloat16).view(np.uint8)
        return values.astype("<f2").view(np.uint8)
