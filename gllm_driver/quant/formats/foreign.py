"""Formats of GGUF that are read by the `gguf` package's decoders, to be repacked when a model is loaded."""

from __future__ import annotations

import numpy as np

from .base import BlockFormat, Planes, dtype_of


class ForeignFormat(BlockFormat):
    """A type by the name ggml gives it, in lower case; no scale_offsets: its scales are no whole f16 numbers."""

    can_encode = False

    def __init__(self, name: str, scale_offsets: tuple[int, ...]) -> None:
        self.dtype = dtype_of(name)
        self.scale_offsets = scale_offsets

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
        raise ValueError(f"{self.name} is only decoded, its quants and scales are not taken apart")


FOREIGN = (
    ForeignFormat("iq2_xxs", (0,)),
    ForeignFormat("iq2_xs", (0,)),
    ForeignFormat("iq2_s", (0,)),
    ForeignFormat("iq3_xxs", (0,)),
    ForeignFormat("iq3_s", (0,)),
    ForeignFormat("iq1_s", (0,)),
    ForeignFormat("iq1_m", ()),
    ForeignFormat("tq1_0", (52,)),
    ForeignFormat("tq2_0", (64,)),
    ForeignFormat("mxfp4", ()),
    ForeignFormat("nvfp4", ()),
)
